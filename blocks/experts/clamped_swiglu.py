from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.grouped_matmul import combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.registry import register
from blockwright.registry.ranges import Count, NonNegative, Positive


@register("experts", "clamped_swiglu")
class ClampedSwiGLUExperts(Experts):
    """gpt-oss's experts: SwiGLU with biases, a clamp, a sharper gate and a one added to the linear half.

    OpenAI 2025 (gpt-oss), arXiv 2508.10925: [g; u] = W_gate_up,e x + b_gate_up,e; g ← min(g, limit),
    u ← clamp(u, ±limit); y = Σ_k w_k (W_down,e (g σ(alpha g) ⊙ (u + 1)) + b_down,e).

    ``gate_up`` holds gate rows, then up rows, as in all experts here; the released weights interleave them and are
    transposed. The router's weight is applied to the hidden vector and to the output bias.

    Args:
        d_ff: F, hidden width of one expert
        limit: bound of the two halves; 7 in gpt-oss
        alpha: sharpness of the gate; 1.702 makes it nearly a GELU
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"gate_up": "matrix", "down": "matrix"}
    residual_outputs: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(
        self, d_model: int, n_experts: int, d_ff: Count, limit: Positive = 7.0, alpha: NonNegative = 1.702
    ) -> None:
        super().__init__()
        self.n_experts, self.limit, self.alpha = n_experts, limit, alpha
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.gate_up_bias = nn.Parameter(torch.empty(n_experts, 2 * d_ff))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.down_bias = nn.Parameter(torch.empty(n_experts, d_model))

    def reset_parameters(self) -> None:
        self.gate_up_bias.zero_()
        self.down_bias.zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts, self.n_experts, routing.pairs)
        expert = routing.experts.flatten().index_select(0, order.sorted).clamp(max=self.n_experts - 1)
        rows = grouped_matmul(dispatch(x, order), self.gate_up.to(x.dtype), order.ends)
        gate, up = (rows + self.gate_up_bias[expert].to(rows.dtype)).chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        weights = routing.weights.flatten().index_select(0, order.sorted).to(gate.dtype)[:, None]
        hidden = gate * (gate * self.alpha).sigmoid() * (up + 1) * weights
        rows = grouped_matmul(hidden, self.down.to(x.dtype), order.ends)
        return combine(rows + self.down_bias[expert].to(rows.dtype) * weights, order)

    def parallel_plan(self) -> dict[str, Placement]:
        return dict.fromkeys(("gate_up", "gate_up_bias", "down", "down_bias"), "expert")
