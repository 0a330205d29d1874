from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.grouped_matmul import combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("experts", "relu2")
class ReLU2Experts(Experts):
    """Two-layer networks with a squared ReLU as routed experts.

    So et al. 2021 (Primer), arXiv 2109.08668; Nemotron 3, arXiv 2512.20856: y = Σ_k w_k W_down,e relu(W_up,e x)². The
    router's weight is applied to the hidden vector.

    Args:
        d_ff: F, hidden width of one expert
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"up": "matrix", "down": "matrix"}
    residual_outputs: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(self, d_model: int, n_experts: int, d_ff: Count) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.up = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts, self.n_experts, routing.pairs)
        rows = grouped_matmul(dispatch(x, order), self.up.to(x.dtype), order.ends)
        weights = routing.weights.flatten().index_select(0, order.sorted).to(rows.dtype)[:, None]
        return combine(grouped_matmul(F.relu(rows).square() * weights, self.down.to(x.dtype), order.ends), order)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"up": "expert", "down": "expert"}
