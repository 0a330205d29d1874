"""A decoder with one of each distinct layer: all that costs and pictures need, in a tenth of the time of composing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.compose import Outline, build_parts, outline
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import LAYER_PARTS, Layer
from blockwright.blocks.precision import default_dtype
from blockwright.registry import Node

# --- modules that compute the same ------------------------------------------------------------------------------------


def alike(layers: Sequence[nn.Module] | nn.ModuleList) -> list[list[int]]:
    """Groups of layers (indices) with equal cost: same classes, shapes and settings.

    A block that stores its ``layer_idx``, or differs in anything else, is alone in its group.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(signature(layer), []).append(index)
    return list(groups.values())


_INTERNAL = frozenset(vars(nn.Module()))


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """What a module computes with: classes, settings and shapes of all its parts."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    settings = [
        (name, type(m), sorted((k, repr(v)) for k, v in vars(m).items() if k not in _INTERNAL))
        for name, m in layer.named_modules()
    ]
    return repr(settings), tuple(shapes)


# --- measurements that are remembered ---------------------------------------------------------------------------------


_memory: ContextVar[dict[Any, int] | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(memory: dict[Any, int]) -> Iterator[None]:
    """Measure equal parts once for all models that are measured within, for a program that changes one part at a time.

    Args:
        memory: what a part computes with, and its input → its cost
    """
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def known() -> dict[Any, int]:
    """Measurements so far, to add to; of this call alone, where ``remembering`` is not in effect."""
    memory = _memory.get()
    return {} if memory is None else memory


def measurement(what: str, part: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """A measurement of a part: all that it depends on."""
    return what, signature(part), tuple(x.shape), x.dtype


class Sample(NamedTuple):
    """A decoder on the meta device with one of each group of equal layers, whose costs are those of the whole.

    decoder: with these layers alone, which may share parts
    layers: for each of them, the indices of those that it stands for
    """

    decoder: Decoder
    layers: tuple[tuple[int, ...], ...]


def sampled(model: Decoder | Sample) -> Sample:
    """One of each group of equal layers of a decoder."""
    if isinstance(model, Sample):
        return model
    groups = alike(model.layers)
    return Sample(model.with_layers(model.layers[group[0]] for group in groups), tuple(map(tuple, groups)))


def sample(config: Any) -> Sample:
    """One of each distinct layer of a composition, on the meta device.

    Layers with the same nodes are equal, but for the parts of which a block takes ``layer_idx`` in its constructor:
    these are built for each layer, and compared.

    Raises:
        ConfigError: as ``compose``
    """
    with default_dtype(torch.float32), torch.device("meta"):
        made = outline(config)
        groups = [group for first in made.alike for group in _of_depth(made, first)]
    embedding, position, norm, head = made.frame
    layers = [layer for layer, _ in groups]
    decoder = Decoder(made.config, embedding, position, layers, norm, head, made.depths, made.inputs, made.loop)
    return Sample(decoder, tuple(tuple(indices) for _, indices in groups))


def _of_depth(made: Outline, first: int) -> list[tuple[Layer, list[int]]]:
    """The layers with the same nodes as a first one, in groups of equal ones."""
    nodes, layer, indices = made.nodes[first], made.layers[first], made.alike[first]
    changing = [kind for kind in LAYER_PARTS if kind in nodes and _takes_depth(kind, nodes)]
    if not changing:
        return [(layer, indices)]
    groups: dict[Any, tuple[Layer, list[int]]] = {}
    for index in indices:
        parts = {kind: getattr(layer, kind) for kind in LAYER_PARTS}
        if index != first:
            parts |= build_parts(made.config, nodes, index, changing)
        key = tuple(signature(parts[kind]) for kind in changing)
        groups.setdefault(key, (Layer(**parts), []))[1].append(index)
    return list(groups.values())


def _takes_depth(kind: str, nodes: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a block of a part depends on the index of its layer."""
    scope = {kind: Node(node, f"model.{kind}") for kind, node in nodes.items()}
    blocks = registry.walk(kind, scope[kind], scope)
    return any("layer_idx" in entry.schema.context for _, entry, _ in blocks)
