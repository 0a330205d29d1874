from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.convolution.base import Convolution, convolved
from blockwright.blocks.ffn.base import FFN, rounded_width
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry.ranges import Count


class Gated(FFN):
    """y = W_down (act(W_gate x) ⊙ W_up x): the shared base of ``swiglu`` and its relatives, which have ``activated``.

    Args:
        d_ff: F, hidden width; null is 8/3 of d_model, rounded up to a multiple of 64
        gate_conv: convolves the gate's half of the hidden layer over the last few tokens; null for none
        up_conv: convolves the other half in the same way; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__()
        width = _width(d_model, d_ff)
        self.gate = Linear(d_model, width, bias=False)
        self.up = Linear(d_model, width, bias=False)
        self.down = Linear(width, d_model, bias=False)
        self.gate_conv, self.up_conv = gate_conv, up_conv

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": _width(known["d_model"], known["d_ff"])}

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The two halves [B,T,F] → [B,T,F]."""
        raise NotImplementedError

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        gate, up = convolved(self.gate_conv, self.gate(x), given), convolved(self.up_conv, self.up(x), given)
        return self.down(self.activated(gate, up)), None

    def parallel_plan(self) -> dict[str, Placement]:
        return {"gate.weight": "column", "up.weight": "column", "down.weight": "row"}


def _width(d_model: int, d_ff: int | None) -> int:
    return d_ff or rounded_width(8 * d_model / 3)
