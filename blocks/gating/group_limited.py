from __future__ import annotations

from torch import Tensor

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating, check_groups, highest, keep_groups
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("gating", "group_limited")
class GroupLimited(LinearGating):
    """Softmax gate restricted to the best groups of experts, so that a token reaches few devices.

    DeepSeek-V2, arXiv 2405.04434, §2.2.2 (device-limited routing): s = softmax(W x); a group's score is its highest
    s_i; the ``top_groups`` best groups are kept; g_i = scaling · s_i for the k highest s_i in them.

    Experts of other groups are masked with −inf. The released code masks with 0, with the same choice: affinities are
    positive, and an expert whose affinity underflows to 0 adds nothing. V2 does not renormalise. Where its released
    code does, it skips ``scaling``; here, as in V3, both apply, so set 1 for that.

    Args:
        top_k: k, experts per token
        n_groups: groups of equal size, contiguous in the expert index; 8 in V2, one per device
        top_groups: groups a token may reach; 3 in V2
        renormalise: whether the chosen weights are divided by their sum
        scaling: factor on the weights; 16 in V2
        balance: balance losses, one or a list; null for none
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        n_groups: Count = 4,
        top_groups: Count = 2,
        renormalise: bool = False,
        scaling: Positive = 1.0,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        check_groups(n_experts, n_groups, top_groups, top_k)
        self.n_groups, self.top_groups = n_groups, top_groups
        self.renormalise, self.scaling = renormalise, scaling

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        group_scores = probs.unflatten(-1, (self.n_groups, -1)).amax(-1)
        kept = probs if experts is not None else keep_groups(probs, group_scores, self.top_groups)
        weights, experts = highest(kept, self.top_k, experts)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling, probs
