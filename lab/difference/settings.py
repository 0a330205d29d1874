"""Every setting of a composition as a value by its path, where it acts: ``ffn.gating.top_k`` → 6.

A block has its name at its own path (``ffn.gating`` → ``softmax_topk``), and its parameters below, defaults included. A
child that a block takes from the model stands in that block, so two compositions are alike if their blocks are,
wherever their YAML writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import LAYER_PARTS
from blockwright.registry.recording import Built, recorded

# --- two mappings of paths to values, side by side --------------------------------------------------------------------


class Absent:
    """Stands for the value of a side that has no such path; null is a value."""

    def __repr__(self) -> str:
        return "–"


ABSENT = Absent()


@dataclass(frozen=True)
class Entry:
    """A path with its values in A and in B; ``ABSENT`` where a side has none."""

    path: str
    a: Any
    b: Any

    @property
    def same(self) -> bool:
        return alike(self.a, self.b)

    def to_plain(self) -> dict[str, Any]:
        """For JSON: ``path``, ``same``, and ``a`` and ``b`` for each side that has it."""
        values = {"a": self.a, "b": self.b}
        return {"path": self.path, "same": self.same, **{k: v for k, v in values.items() if v is not ABSENT}}


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Entry]:
    """Every path of either side: in A's order, each of B alone after the one that precedes it in B."""
    following: dict[str | None, list[str]] = {}
    before = None
    for path in b:
        if path in a:
            before = path
        else:
            following.setdefault(before, []).append(path)
    order = [*following.get(None, ()), *(each for path in a for each in (path, *following.get(path, ())))]
    return [Entry(path, a.get(path, ABSENT), b.get(path, ABSENT)) for path in order]


def alike(a: Any, b: Any) -> bool:
    """Equal values: 1 is 1.0, but not true, and NaN is NaN."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and (a == b or (a != a and b != b))


Settings = dict[str, Any]
ELSEWHERE = ("layout", "variants", "overrides", "format")  # they choose the blocks of layers, which have settings


class Name(str):
    """The name of a block, the value at its own path; any other string is a parameter."""

    __slots__ = ()


@dataclass(frozen=True)
class Composition:
    """A model by its settings.

    Args:
        decoder: on the meta device
        around: settings that are not of single layers: sizes, initialisation, the blocks around the layers
        layers: part of a layer (``attention``, ``ffn``, ``residual``) → the settings of each layer
    """

    decoder: Decoder
    around: Settings
    layers: dict[str, list[Settings]]


def read(model: Mapping[str, Any]) -> Composition:
    """The settings of a complete composition.

    Raises:
        ConfigError: it is refused
    """
    with recorded() as records:
        decoder = compose(model, device="meta")
    kinds = registry.kinds()
    plain = flat({key: value for key, value in decoder.config.items() if key not in (*kinds, *ELSEWHERE)})
    loop = {} if decoder.loop is None else {"loop": decoder.loop}
    blocks = {"norm": decoder.norm, "position": decoder.position, **decoder.inputs, **loop}
    around = {kind: block for kind, block in blocks.items() if records[id(block)].entry.name != "none"}
    for kind, block in around.items():
        plain |= dict(_walk(kind, block, records))
    layers = {
        part: [dict(_part(part, getattr(layer, part), records)) for layer in decoder.layers] for part in LAYER_PARTS
    }
    return Composition(decoder, plain, layers)


def _part(kind: str, block: nn.Module | None, records: Mapping[int, Built]) -> Iterator[tuple[str, Any]]:
    """A part of a layer, as ``_walk`` gives it; nothing of one that the layer is without."""
    return iter(()) if block is None else _walk(kind, block, records)


def _walk(path: str, block: nn.Module, records: Mapping[int, Built]) -> Iterator[tuple[str, Any]]:
    """A block, its parameters and its children, at their paths."""
    built = records[id(block)]
    yield path, Name(built.entry.name)
    yield from flat({name: built.settled(name) for name in built.settings}, f"{path}.").items()
    for slot, child in built.slots():
        yield from _walk(f"{path}.{slot}", child, records)


def flat(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """{"init": {"std": 0.02}} → {"init.std": 0.02}; lists of plain values stay whole."""
    found: Settings = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping | list | tuple) for each in value):
            found |= flat({str(i): each for i, each in enumerate(value)}, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
