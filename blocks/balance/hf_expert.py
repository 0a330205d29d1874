from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.balance.base import Balance, choices, shares
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative


@register("balance", "hf_expert")
class HFExpertBalance(Balance):
    """Expert balance loss over the whole batch, in the convention of Hugging Face's Mixtral, Qwen3-MoE and OLMoE.

    Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4, extended to k choices: loss = α E Σ_i F_i P_i, where F_i
    is the number of choices of i per token; they sum to k. Perfectly even routing gives k·α, against α for ``expert``.

    transformers computes F and P over all layers together; here each layer has its own loss and they are added, so the
    two agree for one routed layer, and for L layers our sum is about L times larger.

    Args:
        alpha: weight of the loss; 0.001 in Qwen3-MoE's configuration, 0.01 in OLMoE's, 0.02 in Mixtral's
    """

    splits: ClassVar[bool] = True

    def __init__(self, alpha: NonNegative = 0.001) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        loss = self.over_batch(choices(experts.flatten(0, 1), probs), shares(probs), real)
        return {"hf_expert_balance": self.alpha * probs.shape[-1] * loss}
