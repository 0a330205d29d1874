from __future__ import annotations

from torch import Tensor

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating, highest
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("gating", "topk_softmax")
class TopKSoftmax(LinearGating):
    """The k highest logits, then a softmax over them.

    Shazeer et al. 2017, arXiv 1701.06538; gpt-oss; Mixtral, arXiv 2401.04088: z = W x + b;
    g_i = exp(z_i) / Σ_{j chosen} exp(z_j) for the k highest z_i, else 0. So weights sum to 1, and it equals
    ``softmax_topk`` with ``renormalise``. Balance losses use the affinities of a softmax over all experts, as in
    Hugging Face's Mixtral.

    Args:
        top_k: k, experts per token
        bias: whether the router adds a learned bias, as in gpt-oss
        balance: balance losses, one or a list; null for none
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        bias: bool = False,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance, bias)

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores, experts = highest(logits, self.top_k, experts)
        return experts, scores.softmax(-1), logits.softmax(-1)
