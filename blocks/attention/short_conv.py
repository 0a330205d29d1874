from __future__ import annotations

from torch import Tensor

from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.base import Placement
from blockwright.blocks.cache.state import State
from blockwright.blocks.depthwise import CausalConv
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Taps


@register("attention", "short_conv")
class ShortConv(Recurrent):
    """A gated convolution over the last few tokens, without attention.

    LFM2, arXiv 2511.23404: y = W_o (W_C x ⊙ conv(W_B x ⊙ W_x x)). LFM2 stores the three projections fused. The cache
    holds (taps − 1)·D numbers, whatever the length.

    Args:
        taps: tokens seen, the current one included; 3 in LFM2
        bias: whether projections and convolution add a bias
    """

    def __init__(self, d_model: int, taps: Taps = 3, bias: bool = False) -> None:
        super().__init__()
        self.input, self.gate, self.value = (Linear(d_model, d_model, bias=bias) for _ in range(3))
        self.value_conv = CausalConv(d_model, taps, bias=bias)
        self.output = Linear(d_model, d_model, bias=bias)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        u = self.input(x) * self.value(x)
        u = u if held is None else held.without_padding(u)  # of a bias
        y, tail = self.shifted("value", u, given.segments, held)
        return self.output(self.gate(x) * y), tail

    def parallel_plan(self) -> dict[str, Placement]:
        column = (name for name, _ in self.named_parameters() if not name.startswith("output"))
        split: dict[str, Placement] = dict.fromkeys(column, "column")
        return {**split, "output.weight": "row"}
