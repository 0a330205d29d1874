from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.ffn.gated import Gated
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "geglu")
class GEGLU(Gated):
    """Gated feed-forward network with a GELU gate.

    Shazeer 2020, arXiv 2002.05202: y = W_down (gelu(W_gate x) ⊙ W_up x). No biases. As in Gemma, with the tanh
    approximation.

    Args:
        approximate: ``tanh`` as in Gemma, ``none`` for the exact GELU
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        approximate: Literal["tanh", "none"] = "tanh",
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, gate_conv, up_conv)
        self.approximate = approximate

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate=self.approximate) * up
