"""Selective state spaces: Mamba-2 and Mamba-3."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.base import Drawn, Placement
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.decay import LONGEST, SHORTEST, check_time_steps, draw_time_steps
from blockwright.blocks.depthwise import CausalConv
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative, Positive, Share, Taps

CONVOLVED = ("value", "key", "query")


@register("attention", "mamba2")
class Mamba2(Recurrent):
    """Mamba-2: a state space model with one decay a head, as a linear recurrence.

    Dao & Gu 2024, arXiv 2405.21060. With v, k, q = silu(conv(W x)) (x, B, C in the paper) and Δ = softplus(W_Δ x + b):
    S ← e^{−Δ exp(a)} S + k (Δ v)ᵀ; y = Sᵀ q + d v; output W_o (norm(y ⊙ silu(W_z x))), with the norm after the gate
    and over each group of heads by itself. Keys and queries are shared by the heads of a group. The released code
    fuses the projections and the convolutions; here they are apart, so that groups can be split over ranks. At the
    start exp(a) = 1 … N, d = 1, and softplus(b) is log-uniform in [0.001, 0.1]. The cache holds N·S·P fp32 numbers and
    the convolutions' last inputs, whatever the length.

    Args:
        n_heads: N, heads
        head_dim: P, width of a head; null is 2 d_model / n_heads, the paper's expansion
        state_dim: width of keys and queries; 128 in the paper's models
        n_groups: sets of keys and queries; divides n_heads
        taps: tokens that the convolutions see, the current one included
        least_step: lower bound of Δ; 0.001 in Nemotron-H
        eps: of the norm
    """

    # eps as in gated_delta
    conformance_settings: ClassVar[dict[str, object]] = {"state_dim": 6, "eps": 0.01, "least_step": 0.01}

    def __init__(
        self,
        d_model: int,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        state_dim: Count = 128,
        n_groups: Count = 1,
        taps: Taps = 4,
        least_step: NonNegative = 0.0,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        if n_heads % n_groups:
            raise BlockError("n_groups", n_groups, f"must divide n_heads ({n_heads})", "Use 1 for one group")
        self.head_dim, self.state_dim = head_dim or max(1, 2 * d_model // n_heads), state_dim
        self.shared_by, self.least_step, self.eps = n_heads // n_groups, least_step, eps
        widths = {"value": n_heads * self.head_dim, "key": n_groups * state_dim, "query": n_groups * state_dim}
        for name, width in widths.items():
            self.add_module(name, Linear(d_model, width, bias=False))
            self.add_module(f"{name}_conv", CausalConv(width, taps, bias=True))
        self.gate = Linear(d_model, n_heads * self.head_dim, bias=False)
        self.time = Linear(d_model, n_heads, bias=False)
        self.time_bias, self.log_rate, self.skip = (nn.Parameter(torch.empty(n_heads)) for _ in range(3))
        self.weight = nn.Parameter(torch.empty(n_heads * self.head_dim))
        self.output = Linear(n_heads * self.head_dim, d_model, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        draw_time_steps(self.time_bias)
        self.log_rate.copy_(torch.arange(1, len(self.log_rate) + 1, device=self.log_rate.device).log())
        self.skip.fill_(1.0)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        (v, v_tail), (k, k_tail), (q, q_tail) = (self.convolved(name, x, given.segments, held) for name in CONVOLVED)
        v = v if held is None else held.without_padding(v)  # of the convolution's bias
        v = v.unflatten(-1, (-1, self.head_dim))
        k, q = (t.unflatten(-1, (-1, self.state_dim)).repeat_interleave(self.shared_by, 2) for t in (k, q))
        steps = F.softplus(at_least_fp32(self.time(x)) + self.time_bias).clamp(min=self.least_step)[..., None]
        decay = -at_least_fp32(self.log_rate).exp()[:, None] * steps
        y, state = self.scan(x, q, k, at_least_fp32(v) * steps, decay, given.segments, held)
        y = self._normalised((y + self.skip[:, None] * v).flatten(-2) * F.silu(at_least_fp32(self.gate(x))))
        return self.output(y.to(x.dtype)), {**v_tail, **k_tail, **q_tail, **state}

    def scan(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, segments: Tensor | None, held: State | None
    ) -> tuple[Tensor, Parts]:
        """What is read of the states, [B,T,N,P], and what is remembered of them."""
        return self.recurred(q, k, v, decay, None, segments, held)

    def _normalised(self, y: Tensor) -> Tensor:
        groups = y.unflatten(-1, (-1, self.shared_by * self.head_dim))
        return (groups * (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight

    def drawn(self) -> Drawn:
        heads = len(self.skip)
        groups = f"{heads // self.shared_by} groups of keys and queries of {self.state_dim}"
        return Drawn((f"{heads} heads of {self.head_dim}", groups, self.convolutions()))

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"state": (len(self.skip), self.state_dim, self.head_dim)}

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = {name: "column" for name, _ in self.named_parameters()}
        return {**split, "output.weight": "row"}


@register("attention", "mamba3")
class Mamba3(Recurrent):
    """Mamba-3: a state space model with a trapezoidal step, states that turn, and several keys a token.

    Lahoti et al. 2026, arXiv 2603.15569. With v = W x (x in the paper), q_r, k_r = turn(norm(W x) + b) for r of R,
    steps Δ = softplus(W_Δ x + b_Δ), rates A = −softplus(W_A x), shares λ = σ(W_λ x) of this token and v_r = p_r ⊙ v:
    S ← e^{ΔA} (S + (1 − λ) Δ Σ_r k_{t−1,r} v_{t−1,r}ᵀ) + λ Δ Σ_r k_r v_rᵀ; y_r = Sᵀ q_r + d v_r;
    y = W_o Σ_r o_r ⊙ y_r ⊙ silu(s_r ⊙ W_z x).

    ``turn`` rotates pairs (2i, 2i + 1) of queries and keys by the sum of π tanh(W_θ x) Δ up to their token, which is a
    state that is complex. p, s and o are there for R above 1 only. The formulas are those of the first release in
    state-spaces/mamba (its references ``mamba3_siso_step_ref`` and ``mamba3_MIMO_step_ref``); since its change 962 A is
    another function of W_A x. The release fuses the projections, and stores the R keys of a group apart;
    here groups are apart, and can be split over ranks. There is no convolution. At the start b, d, s and R·p, R·o are 1
    and softplus(b_Δ) is log-uniform in a range.

    Both terms are computed as one: a token's keys are weighted by λ Δ, and by (1 − λ) Δ of the token after it, which
    its own output does not see. The R keys of a token are R tokens of the recurrence. The cache holds N·S·P numbers of
    state, the last token's keys and value, and the angles, whatever the length.

    Args:
        n_heads: N, heads
        head_dim: P, width of a head; null is 2 d_model / n_heads, the paper's expansion
        state_dim: S, width of keys and queries; 128 in the paper's models
        n_groups: sets of keys and queries; divides n_heads
        rank: R, keys, queries and values that a token has; 4 in the paper's MIMO
        rotated: share of a key that turns; 0.5 or 1 in the release
        least_rate: lower bound of −A
        least_step: shortest initial step; the shorter, the longer a state remembers
        most_step: longest initial step
        eps: of the norms of keys and queries
    """

    conformance_settings: ClassVar[dict[str, object]] = {"state_dim": 8, "rank": 2, "least_step": 0.05, "eps": 0.01}

    def __init__(
        self,
        d_model: int,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        state_dim: Count = 128,
        n_groups: Count = 1,
        rank: Count = 1,
        rotated: Share = 0.5,
        least_rate: NonNegative = 1e-4,
        least_step: Positive = SHORTEST,
        most_step: Positive = LONGEST,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        if n_heads % n_groups:
            raise BlockError("n_groups", n_groups, f"must divide n_heads ({n_heads})", "Use 1 for one group")
        pairs = int(state_dim * rotated) // 2
        if not pairs:
            rule = f"must turn at least one pair of the {state_dim} channels of a key (state_dim)"
            raise BlockError("rotated", rotated, rule, "Raise it, or widen the keys")
        check_time_steps(least_step, most_step)
        P = head_dim or max(1, 2 * d_model // n_heads)
        self.head_dim, self.state_dim, self.rank, self.shared_by = P, state_dim, rank, n_heads // n_groups
        self.least_rate, self.steps, self.eps = least_rate, (least_step, most_step), eps
        self.query, self.key = (Linear(d_model, n_groups * rank * state_dim, bias=False) for _ in range(2))
        self.value, self.gate = (Linear(d_model, n_heads * P, bias=False) for _ in range(2))
        self.time, self.rate, self.share = (Linear(d_model, n_heads, bias=False) for _ in range(3))
        self.angle = Linear(d_model, pairs, bias=False)
        self.time_bias, self.skip = (nn.Parameter(torch.empty(n_heads)) for _ in range(2))
        self.query_norm, self.key_norm = (nn.Parameter(torch.empty(state_dim)) for _ in range(2))
        self.query_bias, self.key_bias = (nn.Parameter(torch.empty(n_heads * rank * state_dim)) for _ in range(2))
        self.spread, self.gate_spread, self.joined = (  # p, s, o
            nn.Parameter(torch.empty(n_heads * rank * P)) if rank > 1 else None for _ in range(3)
        )
        self.output = Linear(n_heads * P, d_model, bias=False)

    def reset_parameters(self) -> None:
        draw_time_steps(self.time_bias, *self.steps)
        for ones in (self.skip, self.query_bias, self.key_bias):
            ones.fill_(1.0)
        for factors, value in ((self.spread, 1 / self.rank), (self.gate_spread, 1.0), (self.joined, 1 / self.rank)):
            if factors is not None:
                factors.fill_(value)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        steps = F.softplus(at_least_fp32(self.time(x)) + self.time_bias)  # [B,T,N]
        rates = F.softplus(at_least_fp32(self.rate(x))).clamp(min=self.least_rate)
        angles = self._angles(x, steps, held)
        q, k = (self._keys(name, x, angles) for name in ("query", "key"))  # [B,T,N,R,S]
        v = at_least_fp32(self.value(x)).unflatten(-1, (-1, self.head_dim))
        values = self._ranks(v, self.spread)  # [B,T,N,R,P]
        share = at_least_fp32(self.share(x)).sigmoid()
        late = (1 - share) * steps  # of the token before
        y, state = self._recurred(q, k, values, -rates * steps, share * steps, late, given.segments, held)
        y = y + self.skip[:, None, None] * values
        y = y * F.silu(self._ranks(at_least_fp32(self.gate(x)).unflatten(-1, (-1, self.head_dim)), self.gate_spread))
        y = y[..., 0, :] if self.joined is None else (y * self._by_rank(self.joined, self.head_dim)).sum(-2)
        kept = {"key": k, "value": v, "angle": angles}
        return self.output(y.flatten(-2).to(x.dtype)), {**state, **{n: self.noted(t, held) for n, t in kept.items()}}

    def _angles(self, x: Tensor, steps: Tensor, held: State | None) -> Tensor:
        """The angles [B,T,N,A] up to each token, in [0, 2π): summed in fp64, since thousands of turns would round."""
        turns = at_least_fp32(self.angle(x)).tanh()[:, :, None] * steps[..., None] * math.pi
        total = turns.double().cumsum(1)
        total = total if held is None else total + held.held["angle"][:, None]
        return total.remainder(2 * math.pi).to(turns.dtype)

    def _keys(self, name: str, x: Tensor, angles: Tensor) -> Tensor:
        """Queries or keys [B,T,N,R,S]: normalised, moved by a bias, and turned."""
        k = at_least_fp32(self.get_submodule(name)(x)).unflatten(-1, (-1, self.rank, self.state_dim))
        k = k * (k.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.get_parameter(f"{name}_norm")
        k = k.repeat_interleave(self.shared_by, 2) + self._by_rank(self.get_parameter(f"{name}_bias"), self.state_dim)
        turned, still = k.tensor_split([2 * angles.shape[-1]], -1)
        even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (f(angles)[..., None, :] for f in (torch.cos, torch.sin))
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        return torch.cat((turned, still), -1)

    def _ranks(self, v: Tensor, factors: Tensor | None) -> Tensor:
        """[B,T,N,P] → [B,T,N,R,P]."""
        return v[..., None, :] if factors is None else v[..., None, :] * self._by_rank(factors, self.head_dim)

    def _by_rank(self, vector: Tensor, width: int) -> Tensor:
        """[N·R·width] → [N,R,width]. Vectors, since no rule for matrices suits them: decay, Muon, rates by width."""
        return vector.unflatten(0, (-1, self.rank, width))

    def _recurred(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        own: Tensor,
        late: Tensor,
        segments: Tensor | None,
        held: State | None,
    ) -> tuple[Tensor, Parts]:
        """The three-term recurrence as one of two terms.

        Args:
            q, k, v: [B,T,N,R,·]
            decay: [B,T,N], ΔA
            own, late: [B,T,N], weights of a token's keys, and of those of the token before it
        """
        R, state, ahead = self.rank, None, F.pad(late[:, 1:], (0, 0, 0, 1))  # what the next token adds of this one
        if segments is not None:
            ahead = ahead * F.pad(segments[:, 1:] == segments[:, :-1], (0, 1))[..., None]
        if held is not None:
            state = held.held["state"] + self._written(
                held.held["key"], self._ranks(held.held["value"], self.spread), late[:, 0]
            )
        weights = own + ahead
        q_each, k_each, v_each = (t.transpose(2, 3).flatten(1, 2) for t in (q, k * weights[..., None, None], v))
        first = F.pad(decay[..., None], (0, R - 1)).transpose(2, 3).flatten(1, 2)[..., None]  # only r = 0 decays
        each = None if segments is None else segments.repeat_interleave(R, 1)
        y, parts = self.recurred(q_each, k_each, v_each, first, None, each, held, state=state)
        y = y.unflatten(1, (-1, R)).transpose(2, 3)
        later = torch.ones(R, R, dtype=torch.bool, device=q.device).triu(1)  # keys of this token behind a query's
        among = q @ k.mT * (weights[..., None, None] * later - ahead[..., None, None])
        if held is not None and held.notes_each:
            parts = {"state": parts["state"][:, R - 1 :: R] - self._written(k, v, ahead)}
        return y + among @ v, parts

    def _written(self, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """Σ_r k_r v_rᵀ [...,N,S,P] of keys and values [...,N,R,·], weighted by [...,N]."""
        return k.mT @ v * weight[..., None, None]

    def drawn(self) -> Drawn:
        heads = len(self.skip)
        several = () if self.rank == 1 else (f"{self.rank} keys a token",)
        groups = f"{heads // self.shared_by} groups of keys and queries of {self.state_dim}"
        return Drawn((f"{heads} heads of {self.head_dim}", groups, *several))

    def memory(self) -> dict[str, tuple[int, ...]]:
        N, S, P = len(self.skip), self.state_dim, self.head_dim
        return {"state": (N, S, P), "key": (N, self.rank, S), "value": (N, P), "angle": (N, self.angle.out_features)}

    def parallel_plan(self) -> dict[str, Placement]:
        whole = "angle.weight", "query_norm", "key_norm"
        split: dict[str, Placement] = {name: "column" for name, _ in self.named_parameters() if name not in whole}
        return {**split, "output.weight": "row"}
