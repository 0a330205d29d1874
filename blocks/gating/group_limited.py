from __future__ import annotations

from torch import Tensor

from blocks.balance.base import Balance
from blocks.gating.base import Gating, check_groups, keep_groups
from registry import register


@register("gating", "group_limited")
class GroupLimited(Gating):
    """Softmax gate whose choice is confined to the best groups of experts, so that a token reaches few devices.

    DeepSeek-V2, arXiv 2405.04434, §2.2.2 (device-limited routing): s = softmax(W x); a group's score is its highest
    s_i; the ``top_groups`` best groups are kept; g_i = scaling · s_i for the k highest s_i in them.

    Experts of other groups are masked with −inf. The released code masks with 0, which could only differ if all
    remaining affinities were exactly 0. Weights are not renormalised, as in V2.

    Args:
        top_k: k, experts a token
        n_groups: groups of equal size, neighbours in the expert index; 8 in V2, one a device
        top_groups: groups a token may reach; 3 in V2
        scaling: factor on the weights; 16 in V2
        balance: loss that evens out the load; null for none
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 2,
        n_groups: int = 4,
        top_groups: int = 2,
        scaling: float = 1.0,
        balance: Balance | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        check_groups(n_experts, n_groups, top_groups, top_k)
        self.n_groups, self.top_groups, self.scaling = n_groups, top_groups, scaling

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        group_scores = probs.unflatten(-1, (self.n_groups, -1)).amax(-1)
        weights, experts = keep_groups(probs, group_scores, self.top_groups).topk(self.top_k)
        return experts, weights * self.scaling, probs
