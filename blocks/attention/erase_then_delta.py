from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.delta_rule import DeltaRule, Edit, unit
from blockwright.blocks.cache.state import State
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.blocks.weights import Kind
from blockwright.registry import register

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
