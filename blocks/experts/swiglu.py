from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.experts import Choices
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("experts", "swiglu")
class SwiGLUExperts(Experts):
    """SwiGLU networks as routed experts.

    Shazeer 2020, arXiv 2002.05202; Dai et al. 2024, arXiv 2401.06066:
    y = Σ_k w_k W_down,e (silu(W_gate,e x) ⊙ W_up,e x).
    ``gate_up`` holds gate rows, then up rows, as transformers stores them; the router's weight is applied to the hidden
    vector, the narrow side. Experts are not separate modules, and no token is dropped.

    Args:
        d_ff: F, hidden width of one expert
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"gate_up": "matrix", "down": "matrix"}
    residual_outputs: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(self, d_model: int, n_experts: int, d_ff: Count) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        choices = Choices(routing.experts, routing.weights, routing.pairs)
        return self.kernels.swiglu_experts(x, choices, self.gate_up, self.down)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"gate_up": "expert", "down": "expert"}
