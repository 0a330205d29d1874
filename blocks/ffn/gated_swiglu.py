from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.ffn.swiglu import SwiGLU
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "gated_swiglu")
class GatedSwiGLU(SwiGLU):
    """SwiGLU whose output is scaled by a learned scalar gate per token.

    The shared expert of Qwen2-MoE, Yang et al. 2024 (Qwen2), arXiv 2407.10671:
    y = σ(w · x) W_down (silu(W_gate x) ⊙ W_up x). As ``shared`` of ``moe`` it is the gated shared expert; DeepSeek's
    shared experts are a plain ``swiglu``.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, gate_conv, up_conv)
        self.token_gate = Linear(d_model, 1, bias=False)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.token_gate(x).sigmoid() * super().forward(x, given)[0], None

    def parallel_plan(self) -> dict[str, Placement]:
        return {**super().parallel_plan(), "token_gate.weight": "replicate"}
