from __future__ import annotations

from torch import Tensor

from blockwright.blocks.ffn.gated import Gated
from blockwright.registry import register


@register("ffn", "swiglu")
class SwiGLU(Gated):
    """Gated feed-forward network with a SiLU gate.

    Shazeer 2020, arXiv 2002.05202: y = W_down (silu(W_gate x) ⊙ W_up x). No biases, as in Llama and DeepSeek.
    """

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.kernels.gate_silu(gate, up)
