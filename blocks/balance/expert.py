from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.balance.base import Balance, choices, shares
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative


@register("balance", "expert")
class ExpertBalance(Balance):
    """Expert-level balance loss of each sequence, averaged over the batch.

    DeepSeek-V2, arXiv 2405.04434, eq. 23: loss = α Σ_i f_i P_i; f_i = E n_i / (k T), where n_i tokens of the sequence
    chose i; P_i = mean_t (s_i,t / Σ_j s_j,t). The division changes nothing for softmax affinities and makes it V3's
    sequence-wise loss for sigmoid ones. f counts the choices made, as in V2's released code; V3's paper defines f by
    the choices that the affinities without the bias would have made.

    Perfectly even routing gives α. Hugging Face's loss for Mixtral, Qwen3-MoE and OLMoE is ``hf_expert``.

    Args:
        alpha: weight of the loss; 0.003 in V2, 0.001 in V2-Lite, 0.0001 in V3
    """

    splits: ClassVar[bool] = True

    def __init__(self, n_experts: int, top_k: int, alpha: NonNegative = 0.003) -> None:
        super().__init__()
        self.n_experts, self.top_k, self.alpha = n_experts, top_k, alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        loss = self.over_sequences(choices(experts, probs), shares(probs), real)
        return {"expert_balance": self.alpha * self.n_experts / self.top_k * loss}
