from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.balance.base import Balance
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative


@register("balance", "z_loss")
class RouterZLoss(Balance):
    """Router z-loss: keeps router logits small, where fp32 softmax and low-precision activations are accurate.

    Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5: loss = α mean_t (log Σ_i exp z_i,t)². It balances no load; it is
    a block of this kind because gates handle it like a balance loss.

    Args:
        alpha: weight of the loss; 0.001 in ST-MoE and OLMoE
    """

    splits: ClassVar[bool] = True

    def __init__(self, alpha: NonNegative = 0.001) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        return {"z_loss": self.alpha * self.mean(logits.logsumexp(-1).square(), real)}
