from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.attention.delta_rule import DeltaRule, Edit
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import register


@register("attention", "gated_delta_2", fixes={"n_key_heads": None})
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
        n_heads: N, heads, each with a state
        head_dim: K, width of a key; null is d_model / n_heads
        v_head_dim: V, width of a value; null is as head_dim
        taps: tokens that the convolutions see, the current one included
        decay: what the state forgets
        norm: of each head's output
        output_gate: gates the normalised outputs; null for none
        negative_eigenvalues: whether b reaches 2 instead of 1, so that erasing may overshoot
            (Grazzi et al. 2024, arXiv 2411.12537); w stays below 1
    """

    default_children: ClassVar[Mapping[str, Any]] = {"decay": {"name": "channel"}, "output_gate": {"name": "low_rank"}}

    def add_gates(self, d_model: int, n_heads: int) -> None:
        self.erase = Linear(d_model, n_heads * self.head_dim, bias=False)
        self.write = Linear(d_model, n_heads * self.v_head_dim, bias=False)

    def edit(self, x: Tensor, k: Tensor, v: Tensor) -> Edit:
        erase, write = (at_least_fp32(gate(x)).sigmoid() for gate in (self.erase, self.write))
        return Edit(v * write.view_as(v), erase=k * erase.view_as(k) * self.reach)
