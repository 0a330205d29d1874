"""What a composition computes, moves and keeps for one token of a training step: measured on the meta device.

Each distinct layer runs once at three lengths while the operators below it are watched, a plug-in's like any other's.
They separate what grows quadratically with the length (scores). Figures are those of the operators that run
here on an accelerator, in bfloat16; how much of the bytes a fused kernel saves is left to the planner's coefficients
(plugins/planner/hardware.py).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blockwright.blocks.attention.base import empty_cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.experts import Experts
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.initialise import initialise
from blockwright.blocks.sample import alike

# --- how far tokens travel to their experts: read off a gate's own choices for random tokens --------------------------


TOKENS = 1024


@functools.lru_cache(maxsize=32)
def _choices(gate: Gating) -> Tensor:
    """Experts [T,k] of random tokens, by a copy of the gate with random weights; E stands for none."""
    drawn = copy.deepcopy(gate).to_empty(device="cpu").float()
    initialise(drawn, std=0.02, depth_scaled=False, n_layers=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    width = next((p.shape[-1] for p in drawn.parameters() if p.ndim == 2), 8)
    x = torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        return drawn(x, torch.randint(256, (1, TOKENS), generator=generator)).experts


def count_visits(gate: Gating) -> float:
    """Experts that a token visits, on average."""
    return float((_choices(gate) < gate.n_experts).sum(1).float().mean())


def count_places(gate: Gating, places: int) -> float:
    """Places that a token's experts lie at, on average, with the experts in equal runs over so many places."""
    chosen = _choices(gate)
    place = (chosen * places // gate.n_experts).clamp(max=places)
    reached = torch.zeros(len(chosen), places + 1, dtype=torch.float32).scatter_(1, place, 1.0)
    return float(reached[:, :places].sum(1).mean())


LENGTHS = (256, 512, 1024)  # tokens: three, since a figure has a constant, a linear and a square part


@dataclass(frozen=True)
class Product:
    """Products with matrices of one shape: FLOPs of the forward pass a token, and the sides, the shorter one first."""

    flops: float
    sides: tuple[int, int]

    def narrow(self, tensor: int) -> float:
        """The narrower side, when ``tensor`` ranks split the matrix along its longer one, as plans here do."""
        return min(self.sides[0], self.sides[1] / tensor)


@dataclass(frozen=True)
class Slice:
    """One token's part of a forward pass, summed over the layers.

    Args:
        products: matrix products outside of the experts
        routed: FLOPs of those of the experts
        scores: FLOPs for each token of the sequence, before any is hidden by a mask
        moved: bytes that all other operators read and write
        kept: bytes that autograd keeps for the backward pass, weights excepted
    """

    products: tuple[Product, ...] = ()
    routed: float = 0.0
    scores: float = 0.0
    moved: float = 0.0
    kept: float = 0.0

    @property
    def dense(self) -> float:
        """FLOPs of the products outside of the experts."""
        return sum(p.flops for p in self.products)

    def times(self, n: float) -> Slice:
        products = tuple(Product(p.flops * n, p.sides) for p in self.products)
        return Slice(products, self.routed * n, self.scores * n, self.moved * n, self.kept * n)

    def __add__(self, other: Slice) -> Slice:
        shapes: dict[tuple[int, int], float] = {}
        for p in (*self.products, *other.products):
            shapes[p.sides] = shapes.get(p.sides, 0.0) + p.flops
        sums = (getattr(self, n) + getattr(other, n) for n in ("routed", "scores", "moved", "kept"))
        return Slice(tuple(Product(f, s) for s, f in sorted(shapes.items()) if f > 1), *sums)


class _Watch(TorchDispatchMode):
    """Sums up the operators that run, by the part of a layer they belong to.

    Args:
        decoder: its attentions and ffns are the parts ``attention`` and ``ffn``, all else is ``around``; a copy to
            throw away, since hooks stay on it
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.products: list[tuple[str, bool, float, tuple[int, int]]] = []  # part, routed, FLOPs, sides
        self.moved = dict.fromkeys(PARTS, 0)
        self.kept = dict.fromkeys(PARTS, 0)
        self._part, self._routed, self._alive = "around", False, {}  # type: tuple[str, bool, dict[int, Any]]
        for name, module in decoder.named_modules():
            if name.rpartition(".")[2] in ("attention", "ffn"):
                self._mark(module, "_part", name.rpartition(".")[2], "around")
            elif isinstance(module, Experts):
                self._mark(module, "_routed", True, False)

    def _mark(self, module: nn.Module, name: str, inside: Any, outside: Any) -> None:
        module.register_forward_pre_hook(lambda *_: setattr(self, name, inside))
        module.register_forward_hook(lambda *_: setattr(self, name, outside))

    def __enter__(self) -> _Watch:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._hooks.__exit__(*raised)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # a weight's is as long at any length, and so drops out
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage  # held, so that no other gets its address
            self.kept[self._part] += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            matrix = [a for a in args if isinstance(a, Tensor)][-1]
            flops = count(*args, **(kwargs or {}), out_val=out)
            self.products.append((self._part, self._routed, flops, (min(matrix.shape[-2:]), max(matrix.shape[-2:]))))
        elif not func.is_view:
            self.moved[self._part] += sum(map(_nbytes, (*args, out)))
        return out


def _nbytes(value: Any) -> int:
    """Of activations alone: of a table that is looked up, only the rows matter, which come out."""
    if isinstance(value, Tensor):
        return 0 if isinstance(value, nn.Parameter) else value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


PARTS = ("attention", "ffn", "around")
Parts = dict[str, Slice]
_Kind = tuple[bool, tuple[int, int]]  # whether it is of experts, and the sides of its matrix


def _watched(decoder: Decoder, run: Callable[[Decoder, int], Any]) -> Parts:
    """What a forward pass does for a token, by part of the layers."""
    watches = []
    for length in LENGTHS:
        with _Watch(decoder) as watch:
            run(decoder, length)
        watches.append(watch)
    found = {}
    for part in PARTS:
        linear, scores = {}, 0.0  # type: tuple[dict[_Kind, float], float]
        for kind, flops in _matched([[p[1:] for p in watch.products if p[0] == part] for watch in watches]):
            _, slope, square = _polynomial(flops)
            if slope > 0.5:
                linear[kind] = linear.get(kind, 0.0) + slope
            scores += max(0.0, square)
        moved, kept = (_polynomial([getattr(w, name)[part] for w in watches])[1] for name in ("moved", "kept"))
        products = tuple(Product(f, n) for (routed, n), f in linear.items() if not routed)
        found[part] = Slice(products, sum(f for (r, _), f in linear.items() if r), scores, moved, kept)
    return found


def _matched(rows: Sequence[Sequence[tuple[bool, float, tuple[int, int]]]]) -> Iterator[tuple[_Kind, list[float]]]:
    """Products at each of ``LENGTHS`` → their FLOPs at all of them: the same product, or all of one kind."""
    if len({len(row) for row in rows}) == 1:
        for row in zip(*rows, strict=True):
            yield (row[0][0], row[0][2]), [flops for _, flops, _ in row]
        return
    # A recurrence has as many products as parts of the sequence, whose matrices are as large at any length.
    kinds = dict.fromkeys((routed, sides) for row in rows for routed, _, sides in row)
    for kind in kinds:
        yield kind, [sum(flops for routed, flops, sides in row if (routed, sides) == kind) for row in rows]


def _polynomial(values: Sequence[float]) -> list[float]:
    """Values at ``LENGTHS`` → the constant, linear and square coefficients."""
    return [float(c) for c in np.linalg.solve(np.vander(LENGTHS, increasing=True).astype(float), values)]


def _forward(decoder: Decoder, length: int) -> Any:
    return decoder(torch.zeros(1, length, dtype=torch.long, device="meta"))


def _predict_further(decoder: Decoder, length: int) -> Any:
    """Multi-token prediction alone, and its products with the head."""
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    positions = torch.arange(length, device="meta")[None]
    hidden = torch.zeros(1, length, decoder.config["d_model"], dtype=torch.bfloat16, device="meta")
    losses = []
    nll, decoder.nll = decoder.nll, lambda h, aim: losses.append(decoder.logits(h)) or h.sum()  # type: ignore
    try:
        return decoder.mtp_nll(hidden, tokens, tokens, positions), losses
    finally:
        decoder.nll = nll  # type: ignore[method-assign]


@dataclass(frozen=True)
class Scores:
    """Attention scores of some layers: FLOPs for each token of the sequence, and how many tokens back they see."""

    flops: float
    window: float

    def seen(self, length: int) -> float:
        """FLOPs per token of a causal sequence, averaged over its places."""
        inside = min(self.window, length)
        return self.flops * (inside - inside**2 / (2 * length))


@dataclass(frozen=True, eq=False)
class Measured:
    """A composition in the planner's figures, for one token unless said otherwise.

    Args:
        decoder: on the meta device
        parts: attention, ffn and around, summed over the layers
        scores: of all layers
        n_layers: with those of multi-token prediction
        n_routed: layers with routed experts
        n_experts: E; 0 without
        expert_width: the narrower side of an expert's matrices
        visits: experts that a token visits in a layer
        cached: numbers that all layers remember
        kv_heads: over which what is remembered splits; 1 where all heads share it
    """

    decoder: Decoder
    parts: Parts
    scores: tuple[Scores, ...]
    n_layers: int
    n_routed: int
    n_experts: int
    expert_width: int
    visits: float
    cached: float
    kv_heads: int

    @functools.cached_property
    def whole(self) -> Slice:
        return self.parts["attention"] + self.parts["ffn"] + self.parts["around"]

    def scores_at(self, length: int) -> float:
        """FLOPs of the scores that a causal mask lets through, forward."""
        return sum(s.seen(length) for s in self.scores)

    @functools.cached_property
    def crossing_numbers(self) -> float:
        """Inputs and outputs of all matrix products, in numbers."""
        d_model, width = self.decoder.config["d_model"], self.expert_width
        routed = self.whole.routed / 2 * (1 / width + 1 / d_model) if width else 0.0
        return routed + sum(p.flops / 2 * (1 / p.sides[0] + 1 / p.sides[1]) for p in self.whole.products)

    def cache_split(self, tensor: int) -> int:
        """How many ways ``tensor`` ranks split what is remembered."""
        return min(tensor, self.kv_heads)

    def training_flops(self, length: int) -> float:
        """Forward and backward, scores halved for causality, nothing counted twice that is computed again."""
        return 3 * (self.whole.dense + self.whole.routed + self.scores_at(length))

    @functools.cached_property
    def head(self) -> float:
        """FLOPs of the products with the head, forward: once, and once for each depth of multi-token prediction."""
        config = self.decoder.config
        return 2 * config["vocab_size"] * config["d_model"] * (1 + len(self.decoder.mtp))

    @functools.cached_property
    def inputs(self) -> int:
        """Numbers of a token that all layers read: the residual stream, or all of several."""
        x = torch.empty(1, 1, self.decoder.config["d_model"], device="meta", dtype=torch.float32)
        given = Pass(torch.empty(1, 1, device="meta", dtype=torch.long), carry={})
        total = x.numel() * (1 + len(self.decoder.mtp))  # the first layer and those of other depths open streams
        for i, index in enumerate(self.decoder.order()):
            residual: Any = self.decoder.layers[index].residual
            total, x = (total + x.numel(), x) if i else (total, residual.open(x))
            x = residual(x, lambda h: h, lambda h, places=None: h, given)
        return total

    def ffn_share(self, length: int) -> float:
        """Of the forward pass's FLOPs, those of feed-forward blocks: what selective recomputation repeats."""
        ffn = self.parts["ffn"]
        return (ffn.dense + ffn.routed) / (self.training_flops(length) / 3)


def measure(decoder: Decoder) -> Measured:
    """Run each distinct layer of a decoder that lies on the meta device.

    Args:
        decoder: float32, of which a copy in bfloat16 is watched
    """
    groups = alike(decoder.layers)
    probe = copy.deepcopy(decoder.with_layers(decoder.layers[group[0]] for group in groups)).to(torch.bfloat16)
    probe.choose_kernels({"attention": "reference"})  # pads no value to the width of keys
    total = empty = _watched(probe.with_layers([]), _forward)
    scores, cached = [], 0.0
    for index, group in enumerate(groups):
        layer = _difference(_watched(probe.with_layers([probe.layers[index]]), _forward), empty)
        times = decoder.visits(group)
        total = {part: total[part] + layer[part].times(times) for part in PARTS}
        window, numbers = _memory(decoder.layers[group[0]].attention)
        scores.append(Scores(sum(s.scores for s in layer.values()) * times, window))
        cached += numbers * times
    if len(decoder.mtp):
        further = _watched(probe.with_layers([]), _predict_further)
        total = {part: total[part] + further[part] for part in PARTS}
        scores.append(Scores(sum(s.scores for s in further.values()), math.inf))
    experts = [m for layer in decoder.layers for m in layer.modules() if isinstance(m, Experts)]
    gates = [m for m in decoder.layers.modules() if isinstance(m, Gating)]
    n_depths = len(decoder.mtp)
    return Measured(
        decoder,
        total,
        tuple(scores),
        len(decoder.layers) + n_depths,
        len(experts) + (n_depths if experts and any(isinstance(m, Experts) for m in decoder.mtp.modules()) else 0),
        gates[-1].n_experts if gates else 0,
        min((n for m in experts for p in m.parameters() if p.ndim > 2 for n in p.shape[1:]), default=0),
        count_visits(gates[-1]) if gates else 0.0,
        cached,
        min(getattr(layer.attention, "n_kv_heads", 1) for layer in decoder.layers),
    )


def _difference(one: Parts, other: Parts) -> Parts:
    return {part: one[part] + other[part].times(-1) for part in PARTS}


def _memory(attention: Any) -> tuple[float, float]:
    """How many tokens back an attention can see, and how many numbers it remembers of each: read off its cache."""
    try:
        one, two, many = (
            empty_cache(attention, 1, n, torch.float32, torch.device("meta"), None).nbytes / 4 for n in (1, 2, FAR)
        )
    except NotImplementedError:
        return math.inf, 0.0
    if two == one:  # a state of constant size
        return math.inf, 0.0
    reach = 1 + (many - one) / (two - one)
    return (math.inf if reach >= FAR else reach), two - one


FAR = 1 << 20
