"""What scored attention remembers of a token: parts side by side in the slots of a cache, declared or found."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.kernels.choice import Kernels

Held = Mapping[str, Tensor | tuple[Tensor, ...]]
Memory = Mapping[str, Sequence[tuple[int, ...]]]
# Of blocks that declare none: what was found, and the shapes of their parameters then. No setting of a block.
FOUND: WeakKeyDictionary[nn.Module, tuple[list[torch.Size], Layout]] = WeakKeyDictionary()


class Layout(NamedTuple):
    """What is remembered of a token: name → the shapes of its parts."""

    shapes: Mapping[str, Sequence[tuple[int, ...]]]

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Of a cache: name → shape of what lies side by side."""
        return {name: (*s[0][:-1], sum(part[-1] for part in s)) for name, s in self.shapes.items()}

    def widths(self) -> dict[str, list[int]]:
        """Name → widths of the parts, where it has several."""
        return {name: [part[-1] for part in s] for name, s in self.shapes.items() if len(s) > 1}

    def apart(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """What a cache holds, slot by slot, what children noted left out → its parts."""
        found: list[Tensor] = []
        for shapes, slot in zip(self.shapes.values(), stored, strict=False):
            found += slot.split([part[-1] for part in shapes], -1) if len(shapes) > 1 else [slot]
        return found


def layout(held: Held) -> Layout:
    """Of what is given to ``attend``."""
    return Layout({name: [tuple(t.shape[2:]) for t in _tuple(part)] for name, part in held.items()})


def parts(held: Held) -> list[Tensor]:
    """In the order in which they are given."""
    return list(chain.from_iterable(_tuple(part) for part in held.values()))


def _tuple(part: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return part if isinstance(part, tuple) else (part,)


def side_by_side(part: Tensor | tuple[Tensor, ...]) -> Tensor:
    """As a cache stores it."""
    return torch.cat(part, -1) if isinstance(part, tuple) else part


def find(block: nn.Module, x: Tensor, given: Any) -> Layout:
    """What the ``mix`` of a block gives to ``attend``, by a pass on the meta device.

    Args:
        block: of ``Scored``
        x, given: of ``mix``, on the meta device

    Raises:
        TypeError: ``mix`` does not attend once, or fails without values
    """
    twin, found, name = _without_values(block), list[Layout](), type(block).__name__

    def noted(x: Tensor, given: Any, q: Tensor, held: Held, latent: Tensor | None = None) -> Tensor:
        if not held:
            raise TypeError(f"{name} makes no keys and values: declare the shapes of those that it reads by memory()")
        found.append(layout(held))
        return twin.read_out(q.new_empty(*q.shape[:3], twin.expand(parts(held))[1].shape[-1]), x, held)

    twin.attend = noted
    with torch.no_grad(), torch.device("meta"):
        try:
            twin.mix(x, given)
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "meta" not in str(error):
                raise  # it would fail on any token
            rule = f"{name}.mix fails on a token without values, by which its memory is found"
            raise TypeError(f"{rule} ({error}): declare it by memory()") from None
    if len(found) != 1:
        raise TypeError(f"{name}.mix calls attend {len(found)} times; it must once")
    return found[0]


def _without_values(block: nn.Module) -> Any:
    """A copy on the meta device, whole where parameters are distributed, for which no memory is needed."""
    memo: dict[int, Any] = {}
    for p in chain(block.parameters(), block.buffers()):
        empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
        memo[id(p)] = nn.Parameter(empty, p.requires_grad) if isinstance(p, nn.Parameter) else empty
    twin = copy.deepcopy(block, memo)
    for module in twin.modules():
        if isinstance(module, Block):
            module.kernels = Kernels()  # those of another device may not know this one
    return twin
