"""A model as it is drawn: panels of distinct layers, the boxes in them, what is cached, the totals. Plain data.

Everything is read off blocks that are built on the meta device, so a plug-in's blocks are drawn as all others. What it
looks like is left to lab/drawing/picture.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry.recording import Built

# --- how a residual block connects the mixers and the norms of a layer ------------------------------------------------


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
    # One branch of two mixers, if they read the same
    reads = {s.part: (s.whole, s.reads) for s in steps}
    if len(found) == 2 and reads[found[0].mixers[0]] == reads[found[1].mixers[0]]:
        first, second = found
        return (Branch(first.mixers + second.mixers, first.before, first.after or second.after, second.beyond),)
    return tuple(found)


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
            given = Pass(torch.zeros(1, 2, dtype=torch.long), carry={})
            stream = fresh(STREAM, residual.open(torch.empty(1, 2, width, dtype=torch.float32)))
            read(STREAM, residual(stream, mixer("attention"), mixer("ffn"), given))
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


@dataclass(frozen=True)
class Cached:
    """A tensor of a cache.

    Args:
        name: in the cache
        shape: of what is kept of one token, or of all of them where it does not grow
        parts: widths side by side in the last dimension; empty for one
        keeps: ``all`` tokens; ``last``: a window of them; ``every``: one of each so many; ``state``: a fixed size
        tokens: of the window, or of those that share one; 0 where there is none
        per_token: numbers that a token adds, beyond windows
        constant: numbers besides: of a window that is full, or of a state
        wide: whether it is fp32 in a bf16 model
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    keeps: str
    tokens: int
    per_token: float
    constant: int
    wide: bool


@dataclass(frozen=True)
class Box:
    """A block, or a part of the decoder that is none.

    Args:
        path: where it is in the picture, by parameters: ``layers.0.attention.position``
        kind: of the block; ``embedding``, ``head`` and the like for other parts
        slot: the parameter, or the part of the decoder, that it is
        name: registered name; "" for other parts
        summary: what it is, in a sentence
        written: configuration path where it is chosen: ``model.attention.position``
        lines: its label, item by item
        acts: what it acts on in the box around it (blocks/base.py)
        chosen: of how many equal parts a token uses how many; None: it chooses nothing
        settings: parameter → value, children left out
        parameters: its number of them, with those of its children
        cached: what it caches of a sequence
        children: boxes in it
        equations: its formulas
        empty: whether it leaves its place empty
    """

    path: str
    kind: str
    slot: str
    name: str = ""
    summary: str = ""
    written: str = ""
    lines: tuple[str, ...] = ()
    acts: str = ""
    chosen: tuple[int, int] | None = None
    settings: Mapping[str, Any] | None = None
    parameters: int = 0
    cached: tuple[Cached, ...] = ()
    children: tuple[Box, ...] = ()
    equations: tuple[str, ...] = ()
    empty: bool = False

    def walk(self) -> Iterator[Box]:
        """The box, then all boxes in it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Panel:
    """Layers that are composed alike.

    Args:
        path: of the first of them, ``layers.0``
        name: a letter, by which the stack refers to it
        layers: their indices
        attention, ffn, residual: the boxes of the first
        memory: likewise; None for a layer without
        branches: how they are connected
        streams: residual streams; 1 for the usual one, 0 if they grow with the depth
        parameters: of one layer
        active: of these, those that a token uses
        cache_numbers: that a token adds to the cache of one layer, at first
        cache_beyond: and beyond windows; None: not measurable, as ``cache_numbers``
        cache_constant: numbers besides, whatever the length
    """

    path: str
    name: str
    layers: tuple[int, ...]
    attention: Box
    ffn: Box
    residual: Box
    memory: Box | None
    branches: tuple[Branch, ...]
    streams: int
    parameters: int
    active: int
    cache_numbers: int | None
    cache_beyond: float | None
    cache_constant: int | None


@dataclass(frozen=True)
class Run:
    """A part of the stack: panels in order, repeated."""

    panels: tuple[str, ...]
    times: int


@dataclass(frozen=True)
class Totals:
    """Figures of the whole model, those of ``blockwright describe``.

    Args:
        parameters, active: as in blocks/cost.py
        context: tokens of the sequence that FLOPs are counted for
        forward_flops, training_flops: per token
        cache_numbers: that a token adds at first; None where an attention has no cache
        cache_beyond: that it adds beyond windows
        cache_constant: besides, whatever the length
        cache_bytes: per token at first, in bf16
        cache_at_context: bytes of ``context`` tokens, in bf16
    """

    parameters: int
    active: int
    context: int
    forward_flops: float
    training_flops: float
    cache_numbers: int | None
    cache_beyond: float | None
    cache_constant: int | None
    cache_bytes: int | None
    cache_at_context: int | None


@dataclass(frozen=True)
class Scheme:
    """A model as it is drawn.

    Args:
        title: its name
        vocab_size, d_model, n_layers, max_positions: of the model
        inputs: what embeds images and the like
        embedding: of tokens
        position: added to the embeddings; None for none
        panels: distinct layers, by their first occurrence
        stack: how they follow each other, from the first layer to the last
        norm, head: after the layers
        loop: what visits layers again; None for none
        mtp: depths of multi-token prediction
        totals: figures of the whole
    """

    title: str
    vocab_size: int
    d_model: int
    n_layers: int
    max_positions: int
    inputs: tuple[Box, ...]
    embedding: Box
    position: Box | None
    panels: tuple[Panel, ...]
    stack: tuple[Run, ...]
    norm: Box
    head: Box
    loop: Box | None
    mtp: tuple[Box, ...]
    totals: Totals

    @property
    def beside(self) -> tuple[Box, ...]:
        """Boxes that are drawn next to the layers."""
        return (*self.inputs, *([self.loop] if self.loop else []))

    def boxes(self) -> Iterator[Box]:
        """All boxes, in the order in which the flow of the model meets them: a layer's once for all that are alike."""
        position = [self.position] if self.position else []
        layers = [box for p in self.panels for box in (p.residual, p.memory, p.attention, p.ffn) if box is not None]
        for box in [*self.beside, self.embedding, *position, *layers, self.norm, self.head, *self.mtp]:
            yield from box.walk()

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        return asdict(self)
