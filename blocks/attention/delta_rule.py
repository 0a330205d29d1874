"""Delta rules: a state is corrected at the address of each key, after a decay by head or by channel."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import even_heads
from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.base import Block, Drawn, Placement
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.decay import Decay
from blockwright.blocks.depthwise import CausalConv
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.initialise import Kind
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.output_gate import OutputGate
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Taps

CONVOLVED = ("query", "key", "value")


class Edit(NamedTuple):
    """What the steps of each token do to the state, one after the other.

    Attributes:
        keys: [B,T·n,N,K], where n steps write
        values: [B,T·n,N,V]
        beta, erase: as of blocks/kernels/recurrence.py
        parts: what is remembered for it, beside the state
    """

    keys: Tensor
    values: Tensor
    beta: Tensor | None = None
    erase: Tensor | None = None
    parts: Parts = MappingProxyType({})


class DeltaRule(Recurrent):
    """A matrix per head that is decayed, and corrected at each key: the shared base of ``gated_delta`` and others.

    How much a token erases and writes is in ``add_gates`` and ``edit``: here by one strength a head and step.

    Args:
        n_heads: N, heads of values, each with a state
        n_key_heads: heads of queries and keys; divides n_heads; null for as many
        head_dim: K, width of a key; null is d_model / n_heads
        v_head_dim: V, width of a value; null is as head_dim
        taps: tokens that the convolutions see, the current one included
        negative_eigenvalues: whether β reaches 2 instead of 1, so that a correction may overshoot
            (Grazzi et al. 2024, arXiv 2411.12537)
        decay: what the state forgets, before the first of the steps
        norm: of each head's output
        output_gate: gates the normalised outputs; null for none
        steps: n, corrections of a token
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "head"}, "output_gate": {"name": "silu"}}
    # A first token's output is (q · k) β v; where q · k is near 0 the norm would magnify its rounding.
    conformance_settings: ClassVar[Mapping[str, Any]] = {"norm": {"name": "rmsnorm", "eps": 0.01}}

    def __init__(
        self,
        d_model: int,
        decay: Decay,
        norm: Norm,
        n_heads: Count = 8,
        n_key_heads: Count | None = None,
        head_dim: Count | None = None,
        v_head_dim: Count | None = None,
        taps: Taps = 4,
        negative_eigenvalues: bool = False,
        output_gate: OutputGate | None = None,
        steps: Count = 2,
    ) -> None:
        super().__init__()
        K, V = _widths(d_model, n_heads, head_dim, v_head_dim)
        keys = n_key_heads or n_heads
        if n_heads % keys:
            raise BlockError("n_key_heads", keys, f"must divide n_heads ({n_heads})", "Leave it out for as many")
        self.head_dim, self.v_head_dim, self.shared_by = K, V, n_heads // keys
        self.reach, self.steps = 2.0 if negative_eigenvalues else 1.0, steps
        for name, width in zip(CONVOLVED, (keys * K, keys * K * steps, n_heads * V * steps), strict=True):
            self.add_module(name, Linear(d_model, width, bias=False))
            self.add_module(f"{name}_conv", CausalConv(width, taps))
        self.add_gates(d_model, n_heads)
        self.output = Linear(n_heads * V, d_model, bias=False)
        self.decay, self.norm, self.output_gate = decay, norm, output_gate

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        K, V = _widths(*(known[name] for name in ("d_model", "n_heads", "head_dim", "v_head_dim")))
        return {"dim": V, "head_dim": V if child == "output_gate" else K}

    def add_gates(self, d_model: int, n_heads: int) -> None:
        """Add the projections that ``edit`` reads; all are split by heads."""
        self.strength = Linear(d_model, n_heads * self.steps, bias=False)

    def edit(self, x: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, held: State | None) -> Edit:
        """The mixer's input x [B,T,D], keys [B,T·n,N,K] of length 1 and values [B,T·n,N,V] → what each step changes."""
        return Edit(k, v, beta=self.strengths(x))

    def strengths(self, x: Tensor) -> Tensor:
        """β [B,T·n,N] of each step."""
        return at_least_fp32(self.each_step(self.strength(x))).sigmoid() * self.reach

    def each_step(self, y: Tensor, *width: int) -> Tensor:
        """A projection [B,T,N·n·W], heads first, so that whole ones are split over ranks → [B,T·n,N,W]."""
        return y.unflatten(-1, (-1, self.steps, *width)).transpose(2, 3).flatten(1, 2)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        q, k, v, tails = self.convolved_heads(x, given.segments, held)
        q, k = (self.shared(unit(t)) for t in (q, k))
        edit = self.edit(x, k, v, given.segments, held)
        n = edit.keys.shape[1] // x.shape[1]
        q, decay = _at_step(q * self.head_dim**-0.5, -1, n), _at_step(self.decay(x), 0, n)
        segments = None if given.segments is None else given.segments.repeat_interleave(n, 1)
        y, state = self.recurred(q, edit.keys, edit.values, decay, edit.beta, segments, held, erase=edit.erase)
        if n > 1:
            y = y[:, n - 1 :: n]
            each = held is not None and held.notes_each
            state = {name: s[:, n - 1 :: n] if each else s for name, s in state.items()}
        return self.gated(x, y), {**tails, **edit.parts, **state}

    def convolved_heads(
        self, x: Tensor, segments: Tensor | None, held: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Parts]:
        """Queries [B,T,·,K] and keys [B,T·n,·,K] of the heads of keys, values [B,T·n,N,V], and their inputs' tails."""
        (q, q_tail), (k, k_tail), (v, v_tail) = (self.convolved(name, x, segments, held) for name in CONVOLVED)
        q, k, v = (
            q.unflatten(-1, (-1, self.head_dim)),
            self.each_step(k, self.head_dim),
            self.each_step(v, self.v_head_dim),
        )
        return q, k, v, {**q_tail, **k_tail, **v_tail}

    def shared(self, t: Tensor) -> Tensor:
        """[B,T,·,…] of the heads of keys → [B,T,N,…], each for the heads of values that share it."""
        return t.repeat_interleave(self.shared_by, 2)

    def gated(self, x: Tensor, y: Tensor) -> Tensor:
        """What is read of the states, [B,T,N,V] → the mixer's output [B,T,D]."""
        y = self.norm(y.to(x.dtype))
        y = y if self.output_gate is None else self.output_gate(x, y)
        return self.output(y.flatten(-2))

    def drawn(self) -> Drawn:
        heads, steps = self.output.in_features // self.v_head_dim, self.steps
        shared = () if self.shared_by == 1 else (f"{heads // self.shared_by} of queries and keys",)
        widths = f"keys {self.head_dim}, values {self.v_head_dim}"
        of_token = () if steps == 1 else (f"{steps} steps a token",)
        return Drawn((f"{heads} heads", *shared, widths, *of_token, self.convolutions()))

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"state": (self.output.in_features // self.v_head_dim, self.head_dim, self.v_head_dim)}

    def head_rows(self) -> dict[str, tuple[int, ...]]:
        widths = {"query": self.head_dim, "key": self.head_dim, "value": self.v_head_dim}
        return {f"{name}.weight": (width,) for name, width in widths.items()}

    def parallel_plan(self) -> dict[str, Placement]:
        children = tuple(f"{n}." for n, child in self.named_children() if isinstance(child, Block))
        own: dict[str, Placement] = {n: "column" for n, _ in self.named_parameters() if not n.startswith(children)}
        return {**own, "output.weight": "row"}


def _at_step(y: Tensor, step: int, n: int) -> Tensor:
    """Numbers [B,T,…] of tokens at one of their n steps, and 0 at the others, [B,T·n,…]."""
    if n == 1:
        return y
    places = y.new_zeros(*y.shape[:2], n, *y.shape[2:])
    places[:, :, step] = y
    return places.flatten(1, 2)


def unit(x: Tensor) -> Tensor:
    """Heads [B,T,N,K] of length 1, in at least fp32."""
    x = at_least_fp32(x)
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _widths(d_model: int, n_heads: int, head_dim: int | None, v_head_dim: int | None) -> tuple[int, int]:
    K = head_dim or even_heads(d_model, n_heads)
    return K, v_head_dim or K


@register("attention", "gated_delta", fixes={"steps": 1})
class GatedDelta(DeltaRule):
    """Gated delta rule: a matrix per head that is decayed, and corrected towards each new value.

    Yang et al. 2024 (Gated DeltaNet), arXiv 2412.06464. With q, k, v = silu(conv(W x)), q and k normalised to length 1
    a head, q scaled by 1/√K, β = σ(w_β · x) and log decay g of the child ``decay``:
    S ← Diag(e^g) S; S ← S + k β (v − Sᵀ k)ᵀ; y = W_o gate(norm(Sᵀ q)).

    Query and key heads may be fewer than value heads, which have a state each. Projections, convolutions and gate are
    separate parameters, so that heads can be split over ranks; Qwen3-Next stores them fused. States are fp32 in any
    model. The cache is a state of N·K·V numbers and the last taps − 1 inputs of the convolutions, whatever the
    length. Cost per token: see blocks/kernels/recurrence.py.
    """


@register("attention", "delta_product")
class DeltaProduct(DeltaRule):
    """Gated delta rule of several steps a token: a state that many reflections can turn, where one only mirrors it.

    Siems et al. 2025 (Gated DeltaProduct), arXiv 2502.10297: with n keys, values and β of each token, S ← Diag(e^g) S;
    S ← S + k_j β_j (v_j − Sᵀ k_j)ᵀ for j = 1 … n; y = W_o gate(norm(Sᵀ q)), all else as in ``gated_delta``. A product
    of n generalised reflections can be any rotation of an n-dimensional space, so that one layer follows permutations
    of n + 1 things.

    Computed as n tokens for each, so it costs n times ``gated_delta``; the cache is that of ``gated_delta``, with n
    times the inputs of the convolutions of keys and values. Projections hold the steps of a head side by side, so that
    heads can be split over ranks; flash-linear-attention holds the heads of a step.
    """


@register("attention", "gated_delta_2", fixes={"n_key_heads": None, "steps": 1})
class GatedDelta2(DeltaRule):
    """Gated delta rule that erases and writes by gates of their own, each with a number for every channel.

    Hatamizadeh et al. 2026 (Gated DeltaNet-2), arXiv 2605.22791, in the order of NVlabs/GatedDeltaNet-2 and of
    flash-linear-attention (``naive_recurrent_gdn2``): q, k, v and log decay g as in ``gated_delta``, b = σ(W_b x) for
    the K channels of a key, w = σ(W_w x) for the V channels of a value, S ← Diag(e^g) S;
    S ← S − k (Sᵀ (b ⊙ k))ᵀ + k (w ⊙ v)ᵀ; y = W_o gate(norm(Sᵀ q)).

    With b = w = β it is ``kda``, and with a ``decay`` by head ``gated_delta``. There are as many heads of keys as of
    values, and the gate's projections have no bias; the released code allows fewer, and has one in the output gate. The
    cache is that of ``gated_delta``.

    Args:
        negative_eigenvalues: whether b reaches 2 instead of 1, so that erasing may overshoot
            (Grazzi et al. 2024, arXiv 2411.12537); w stays below 1
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "channel"}, "output_gate": {"name": "low_rank"}}

    def add_gates(self, d_model: int, n_heads: int) -> None:
        self.erase = Linear(d_model, n_heads * self.head_dim, bias=False)
        self.write = Linear(d_model, n_heads * self.v_head_dim, bias=False)

    def edit(self, x: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, held: State | None) -> Edit:
        erase, write = (at_least_fp32(gate(x)).sigmoid() for gate in (self.erase, self.write))
        return Edit(k, v * write.view_as(v), erase=k * erase.view_as(k) * self.reach)


@register("attention", "kda", fixes={"n_key_heads": None})
class KDA(GatedDelta):
    """Kimi Delta Attention: the gated delta rule with a decay for each channel of the keys.

    Kimi Linear, arXiv 2510.26692. It is ``gated_delta`` with the children ``decay: channel`` and
    ``output_gate: low_rank`` as defaults, and as many heads of keys as of values.
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "channel"}, "output_gate": {"name": "low_rank"}}


RANK = 16  # of the address, in the paper


@register("attention", "erase_then_delta", fixes={"n_key_heads": None, "steps": 1})
class EraseThenDelta(DeltaRule):
    """Delta rule that first erases at an address of its own, since what is out of date may lie elsewhere.

    Li et al. 2026 (Erase-then-Delta Attention), arXiv 2606.26560. With q, k, v, β and log decay g as in ``kda``, an
    address e = W_n A x of length 1 for each head n, of rank 16, and a strength γ of erasing:
    S ← Diag(e^g) S; S ← S − γ e (Sᵀ e)ᵀ; S ← S + k β (v − Sᵀ k)ᵀ; y = W_o gate(norm(Sᵀ q)).

    That γ = σ(w · x), and that the address sees no convolution, is ours: no code was public. With γ = 0 it is ``kda``,
    and with a ``decay`` by head ``gated_delta``. Computed as two tokens for each, so it costs twice ``kda``; the cache
    is that of ``kda``.

    Args:
        negative_eigenvalues: whether β reaches 2 instead of 1; γ stays below 1
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "channel"}, "output_gate": {"name": "low_rank"}}
    weight_kinds: ClassVar[Mapping[str, Kind]] = {"address_up": "matrix"}

    def add_gates(self, d_model: int, n_heads: int) -> None:
        super().add_gates(d_model, n_heads)
        self.erase_strength = Linear(d_model, n_heads, bias=False)
        self.address_down = Linear(d_model, n_heads * RANK, bias=False)
        self.address_up = nn.Parameter(torch.empty(n_heads, self.head_dim, RANK))

    def edit(self, x: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, held: State | None) -> Edit:
        inner = self.address_down(x).unflatten(-1, (-1, RANK, 1))
        address = unit((self.address_up @ inner)[..., 0])
        strength = at_least_fp32(self.erase_strength(x)).sigmoid()
        pairs = (address, k), (torch.zeros_like(v), v), (strength, self.strengths(x))
        keys, values, beta = (torch.stack(pair, 2).flatten(1, 2) for pair in pairs)
        return Edit(keys, values, beta)
