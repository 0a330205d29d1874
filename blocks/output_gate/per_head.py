from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.linear import Linear
from blockwright.blocks.output_gate.base import OutputGate
from blockwright.registry import register


@register("output_gate", "per_head")
class PerHead(OutputGate):
    """One sigmoid gate for each head.

    Qiu et al. 2025, arXiv 2505.06708, headwise: y_n ← σ(w_n · x) y_n, W of N rows.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.project = Linear(d_model, n_heads, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.project(x).sigmoid()[..., None]

    def parallel_plan(self) -> dict[str, Placement]:
        return {"project.weight": "column"}
