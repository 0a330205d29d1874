"""How a residual block connects the mixers and the norms of a layer: observed in a pass on the meta device.

Mixers and norms return fresh tensors, so autograd's graph of an input holds the parts that it is made of, and no more.
A plug-in's residual block is drawn as it computes, without declaring anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry.recording import Built

STREAM = "stream"  # what enters the layer
MIXERS = ("attention", "ffn")


@dataclass(frozen=True)
class Branch:
    """Mixers that read the same, from the residual stream to the sum with it.

    Args:
        mixers: ``attention``, ``ffn``, or both where they run side by side; or ``memory``
        before: parameter of the norm of what they read; "" for none
        after: of the norm of what they write, before it is added; "" for none
        beyond: of the norm of the sum; "" for none
    """

    mixers: tuple[str, ...]
    before: str = ""
    after: str = ""
    beyond: str = ""


@dataclass(frozen=True)
class Step:
    """A call: which part, what it reads, and whether that is the output of one other part as it is."""

    part: str
    reads: frozenset[str]
    whole: str


def branches(residual: Residual, norms: Mapping[str, nn.Module], width: int) -> tuple[Branch, ...]:
    """The branches of a layer, in the order of computation.

    Args:
        residual: on the meta device
        norms: parameter → norm, those that are its children
        width: D
    """
    steps = _observed(residual, norms, width)
    found: list[Branch] = []
    for place, step in enumerate(steps):
        if step.part in MIXERS:
            norm = next((s for s in steps[:place] if s.part == step.whole and s.part in norms), None)
            before = norm.part if norm and not _carries(norm, steps[place:]) else ""
            found.append(Branch((step.part,), before, *_later(step.part, steps[place + 1 :], norms)))
    return _together(found, steps)


def norms(residual: nn.Module, records: Mapping[int, Built]) -> dict[str, nn.Module]:
    """Parameter → norm of a residual block, those of a residual block inside it included."""
    children = records[id(residual)].children
    inner = [norms(child, records) for child in children.values() if isinstance(child, Residual)]
    own: dict[str, nn.Module] = {slot: child for slot, child in children.items() if isinstance(child, Norm)}
    for held in inner:
        own |= held
    return own


def _later(mixer: str, steps: Sequence[Step], norms: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The norm of a mixer's output, and the norm of the sum with it that the stream itself passes."""
    after = next((s.part for s in steps if s.part in norms and s.whole == mixer), "")
    sums = [(s, steps[i + 1 :]) for i, s in enumerate(steps) if s.part in norms and mixer in s.reads and not s.whole]
    beyond = next((s.part for s, later in sums if _carries(s, later)), "")
    return after, beyond


def _carries(norm: Step, later: Sequence[Step]) -> bool:
    """Whether the stream passes a norm: it is the result, or in a sum, and what the norm reads is read no more."""
    carried = any(norm.part in s.reads and (len(s.reads) > 1 or s.part == STREAM) for s in later)
    return carried and not any(norm.reads & s.reads for s in later)


def _together(found: Sequence[Branch], steps: Sequence[Step]) -> tuple[Branch, ...]:
    """One branch of two mixers, if they read the same."""
    reads = {s.part: (s.whole, s.reads) for s in steps}
    if len(found) == 2 and reads[found[0].mixers[0]] == reads[found[1].mixers[0]]:
        first, second = found
        return (Branch(first.mixers + second.mixers, first.before, first.after or second.after, second.beyond),)
    return tuple(found)


def _observed(residual: Residual, norms: Mapping[str, nn.Module], width: int) -> list[Step]:
    """The calls of a pass, and last its result under the name of the stream."""
    sources, steps = dict[int, tuple[str, Tensor]](), list[Step]()

    def fresh(name: str, like: Tensor) -> Tensor:
        made = torch.empty_like(like).requires_grad_()
        sources[id(made)] = name, made
        return made

    def read(part: str, x: Tensor) -> None:
        names = frozenset(sources[id(leaf)][0] for leaf in _leaves(x) if id(leaf) in sources)
        steps.append(Step(part, names, sources[id(x)][0] if id(x) in sources else ""))

    def mixer(part: str) -> Mixer:
        def mix(x: Tensor, places: Tensor | None = None) -> Tensor:
            read(part, x)
            return fresh(part, x)

        return mix

    def hook(part: str) -> Any:
        def called(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            read(part, inputs[0])
            return fresh(part, output)

        return called

    hooks = [norm.register_forward_hook(hook(part)) for part, norm in norms.items()]
    try:
        with torch.enable_grad(), torch.device("meta"):
            stream = fresh(STREAM, residual.open(torch.empty(1, 2, width, dtype=torch.float32)))
            read(STREAM, residual(stream, mixer("attention"), mixer("ffn")))
    finally:
        for each in hooks:
            each.remove()
    return steps


def _leaves(x: Tensor) -> Iterator[Tensor]:
    """The tensors of autograd's graph that it begins with."""
    if x.grad_fn is None:
        yield x
        return
    seen, left = {x.grad_fn}, [x.grad_fn]
    while left:
        node = left.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        for inner, _ in node.next_functions:
            if inner is not None and inner not in seen:
                seen.add(inner)
                left.append(inner)
