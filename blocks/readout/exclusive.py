from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.readout.base import Readout
from blockwright.registry import register


@register("readout", "exclusive")
class Exclusive(Readout):
    """Exclusive self-attention: a head's output without what it says of the token itself.

    XSA, arXiv 2603.09078: y_t ← y_t − (y_t·v̂_t) v̂_t with v̂ = v / ‖v‖, head by head. No parameters.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        own = F.normalize(v, dim=-1).repeat_interleave(y.shape[2] // v.shape[2], 2)
        return y - (y * own).sum(-1, keepdim=True) * own
