from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.output_gate.per_head import PerHead
from blockwright.registry import register


@register("output_gate", "softplus")
class Softplus(PerHead):
    """One softplus gate for each head, which may also amplify it.

    Laguna: y_n ← softplus(w_n · x) y_n, W of N rows.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * F.softplus(self.project(x))[..., None]
