from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.linear import Linear
from blockwright.blocks.output_gate.base import OutputGate
from blockwright.registry import register


@register("output_gate", "elementwise")
class Elementwise(OutputGate):
    """A sigmoid gate for every element of every head.

    Qiu et al. 2025, arXiv 2505.06708: y ← σ(W x) ⊙ y, W of N·H rows.
    """

    def __init__(self, d_model: int, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.project = Linear(d_model, n_heads * head_dim, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.project(x).sigmoid().view_as(y)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"project.weight": "column"}
