from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.ffn.base import FFN, rounded_width
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "swiglu")
class SwiGLU(FFN):
    """Gated feed-forward network with a SiLU gate.

    Shazeer 2020, arXiv 2002.05202: y = W_down (silu(W_gate x) ⊙ W_up x). No biases, as in Llama and DeepSeek.

    Args:
        d_ff: F, hidden width; null is 8/3 of d_model, rounded up to a multiple of 64
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(self, d_model: int, d_ff: Count | None = None) -> None:
        super().__init__()
        width = d_ff or rounded_width(8 * d_model / 3)
        self.gate = Linear(d_model, width, bias=False)
        self.up = Linear(d_model, width, bias=False)
        self.down = Linear(width, d_model, bias=False)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.down(self.kernels.gate_silu(self.gate(x), self.up(x))), None

    def parallel_plan(self) -> dict[str, Placement]:
        return {"gate.weight": "column", "up.weight": "column", "down.weight": "row"}
