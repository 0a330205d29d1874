from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.attention.delta_rule import DeltaRule, Edit
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register


@register("attention", "gated_delta")
class GatedDelta(DeltaRule):
    """Gated delta rule: a matrix per head that is decayed, and corrected towards each new value.

    Yang et al. 2024 (Gated DeltaNet), arXiv 2412.06464. With q, k, v = silu(conv(W x)), q and k normalised to length 1
    a head, q scaled by 1/√K, β = σ(w_β · x) and log decay g of the child ``decay``:
    S ← Diag(e^g) S; S ← S + k β (v − Sᵀ k)ᵀ; y = W_o gate(norm(Sᵀ q)).

    Query and key heads may be fewer than value heads, which have a state each. Projections, convolutions and gate are
    separate parameters, so that heads can be split over ranks; Qwen3-Next stores them fused. States are fp32 in any
    model. The cache is a state of N·K·V numbers and the last taps − 1 inputs of the convolutions, whatever the
    length. Cost per token: see blocks/kernels/recurrence.py.

    Args:
        n_heads: N, heads of values, each with a state
        n_key_heads: heads of queries and keys; divides n_heads; null for as many
        head_dim: K, width of a key; null is d_model / n_heads
        v_head_dim: V, width of a value; null is as head_dim
        taps: tokens that the convolutions see, the current one included
        negative_eigenvalues: whether β reaches 2 instead of 1, so that a correction may overshoot
            (Grazzi et al. 2024, arXiv 2411.12537)
        decay: what the state forgets
        norm: of each head's output
        output_gate: gates the normalised outputs; null for none
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "head"}, "output_gate": {"name": "silu"}}

    def add_gates(self, d_model: int, n_heads: int) -> None:
        self.strength = Linear(d_model, n_heads, bias=False)

    def edit(self, x: Tensor, k: Tensor, v: Tensor) -> Edit:
        return Edit(v, beta=at_least_fp32(self.strength(x)).sigmoid() * self.reach)
