"""Delta rules whose correction is a better step of an optimizer: with momentum, or preconditioned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.delta_rule import DeltaRule, Edit, unit
from blockwright.blocks.attention.recurrent import Parts
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.decay import Decay, check_by_head
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.momentum import momentum_recurrence
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.output_gate import OutputGate
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register
from blockwright.registry.ranges import Count, Taps

LEAST = -2.0  # log decay of momentum


@register("attention", "momentum_delta")
class MomentumDelta(DeltaRule):
    """Gated delta rule whose corrections have momentum: a token moves the state for as long as the momentum lasts.

    Huang et al. 2026 (Momentum DeltaNet), arXiv 2605.05838, in the order of HuuYuLong/MomentumDeltaNet. With q, k and v
    as in ``gated_delta``, but q normalised after q ← q − e^d k, and for each head η = 1 + tanh(w_η · x / √D),
    r = η e^f, μ = e^h, log decays g and h, h at least −2, and numbers d and f:
    α = e^g / (1 + r²); β = σ(w_β · x) r² / (1 + r²); M ← μ M + η k (Sᵀ α k − v)ᵀ; S ← α S − β M;
    y = W_o gate(norm(Sᵀ q)).

    α and β sum to at most 1: the paper's bound, by which the two states do not grow. The decay is by head, since two
    states of one decay each are computed in chunks by two matrices for all channels (blocks/kernels/momentum.py). At
    the start e^f is uniform in [0, 4] and e^d in [0, 1]. The cache is that of ``gated_delta`` with M beside S.

    Args:
        decay: by head; g, what the state forgets
        momentum: by head; h, what the momentum forgets
    """

    default_children: ClassVar[Mapping[str, Any]] = {
        "decay": {"name": "head"},
        "momentum": {"name": "head"},
        "output_gate": {"name": "elementwise"},
    }

    def __init__(
        self,
        d_model: int,
        decay: Decay,
        momentum: Decay,
        norm: Norm,
        n_heads: Count = 8,
        n_key_heads: Count | None = None,
        head_dim: Count | None = None,
        v_head_dim: Count | None = None,
        taps: Taps = 4,
        output_gate: OutputGate | None = None,
    ) -> None:
        check_by_head("decay", decay)
        check_by_head("momentum", momentum)
        widths = n_heads, n_key_heads, head_dim, v_head_dim, taps
        super().__init__(d_model, decay, norm, *widths, output_gate=output_gate, steps=1)
        self.momentum = momentum

    def add_gates(self, d_model: int, n_heads: int) -> None:
        super().add_gates(d_model, n_heads)
        self.rate = Linear(d_model, n_heads, bias=False)
        self.log_share, self.log_correction = (nn.Parameter(torch.empty(n_heads)) for _ in range(2))  # f, d

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for values, most in ((self.log_share, 4.0), (self.log_correction, 1.0)):
            values.copy_(torch.empty_like(values, dtype=torch.float32).uniform_(1e-3, most).log_())

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        q, k, v, tails = self.convolved_heads(x, given.segments, held)
        q, k = self.shared(q), self.shared(k)
        q, k = unit(q - at_least_fp32(self.log_correction).exp()[:, None] * k), unit(k)
        rate = 1 + (at_least_fp32(self.rate(x)) / math.sqrt(x.shape[-1])).tanh()
        odds = (rate * at_least_fp32(self.log_share).exp()).square()  # β's share to α's
        decay = self.decay(x)[..., 0] - odds.log1p()
        strength = self.strengths(x) * odds / (1 + odds)
        numbers = decay, self.momentum(x)[..., 0].clamp(min=LEAST), rate, strength
        state = None if held is None else held.held["state"]
        y, state = momentum_recurrence(q * self.head_dim**-0.5, k, v, *numbers, state, given.segments)
        return self.gated(x, y), {**tails, "state": state}

    def memory(self) -> dict[str, tuple[int, ...]]:
        ((heads, K, V),) = super().memory().values()
        return {"state": (heads, 2 * K, V)}


MOST = 1.5  # factor by which a channel of a key is stretched, or shrunk; at most 2, or a state may grow
FIRST_CENTRE = -0.2


@register("attention", "preconditioned_delta")
class PreconditionedDelta(DeltaRule):
    """Gated delta rule that writes less along the channels of keys that have been written often.

    Preconditioned DeltaNet (PGDN), arXiv 2604.21100, by the formulas of flash-linear-attention
    (``naive_recurrent_precond_gated_delta_rule``). With q, k, v, β and log decay g as in ``gated_delta``, and for each
    head of keys a second log decay h of the child ``curvature``, a strength α = σ(w_α · x) and a centre c:
    u ← e^h u + α k ⊙ k; r = log(u + 1e−6) − c; p = 1.5^(−r / (1 + |r|));
    S ← Diag(e^g) S; S ← S + (p ⊙ k) β (v − Sᵀ k)ᵀ; y = W_o gate(norm(Sᵀ q)).

    u estimates the diagonal of the curvature, the keys' second moments, and p its inverse, squashed into [1/1.5, 1.5],
    so that no eigenvalue leaves the unit circle. With p = 1 it is ``gated_delta``. At the start c = −0.2. The
    cache is that of ``gated_delta``, and K numbers of u for each head of keys.

    Args:
        curvature: by head; h, what u forgets
    """

    default_children: ClassVar[Mapping[str, Any]] = {**DeltaRule.default_children, "curvature": {"name": "head"}}

    def __init__(
        self,
        d_model: int,
        decay: Decay,
        curvature: Decay,
        norm: Norm,
        n_heads: Count = 8,
        n_key_heads: Count | None = None,
        head_dim: Count | None = None,
        v_head_dim: Count | None = None,
        taps: Taps = 4,
        negative_eigenvalues: bool = False,
        output_gate: OutputGate | None = None,
    ) -> None:
        check_by_head("curvature", curvature)
        widths = n_heads, n_key_heads, head_dim, v_head_dim, taps
        super().__init__(d_model, decay, norm, *widths, negative_eigenvalues, output_gate, steps=1)
        self.curvature = curvature

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        context = super().child_context(child, known)
        return {**context, "n_heads": known["n_key_heads"] or known["n_heads"]} if child == "curvature" else context

    def add_gates(self, d_model: int, n_heads: int) -> None:
        super().add_gates(d_model, n_heads)
        keys = n_heads // self.shared_by
        self.curvature_strength = Linear(d_model, keys, bias=False)
        self.centre = nn.Parameter(torch.empty(keys))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.centre.fill_(FIRST_CENTRE)

    def edit(self, x: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, held: State | None) -> Edit:
        squares = k[:, :, :: self.shared_by].square()
        strength = at_least_fp32(self.curvature_strength(x)).sigmoid()[..., None]
        one, state = torch.ones_like(strength), None if held is None else held.held["curvature"]
        given = one, one, squares * strength, self.curvature(x), None, segments, held
        u, after = self.recurred(*given, state=state)
        r = (u + 1e-6).log() - self.centre[:, None]
        p = MOST ** -(r / (1 + r.abs()))
        beta = self.strengths(x)[..., None]
        return Edit(k * self.shared(p), v * beta, erase=k * beta, parts={"curvature": after["state"]})

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {**super().memory(), "curvature": (len(self.centre), 1, self.head_dim)}


@register("attention", "preconditioned_kda", fixes={"n_key_heads": None})
class PreconditionedKDA(PreconditionedDelta):
    """Kimi Delta Attention that writes less along the channels of keys that have been written often.

    Preconditioned DeltaNet (PKDA), arXiv 2604.21100. It is ``preconditioned_delta`` with the children ``decay:
    channel`` and ``output_gate: low_rank`` as defaults, and as many heads of keys as of values.
    """

    default_children: ClassVar[Mapping[str, Any]] = {
        "decay": {"name": "channel"},
        "curvature": {"name": "head"},
        "output_gate": {"name": "low_rank"},
    }
