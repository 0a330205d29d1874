from __future__ import annotations

from torch import Tensor

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating, highest
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("gating", "softmax_topk")
class SoftmaxTopK(LinearGating):
    """Softmax over all experts, then the k highest.

    Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066: s = softmax(W x); g_i = s_i for the k highest s_i, else 0.
    Also V2-Lite's gate and, renormalised, Qwen3-MoE's; Mixtral's softmax over the top-k logits equals the renormalised
    form. ``scaling`` applies whether or not weights are renormalised, as in V3; V2's remote code skips it then.

    Args:
        top_k: k, experts per token
        renormalise: whether the chosen weights are divided by their sum
        scaling: factor on the weights
        balance: balance losses, one or a list; null for none
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        renormalise: bool = False,
        scaling: Positive = 1.0,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        self.renormalise, self.scaling = renormalise, scaling

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        weights, experts = highest(probs, self.top_k, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights * self.scaling, probs
