"""Gates whose weights are a softmax of the experts' scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating, check_groups, highest, keep_groups
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32
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


@register("gating", "normed_softmax")
class NormedSoftmax(LinearGating):
    """A softmax gate that reads tokens through a norm of its own, and scales each expert.

    Gemma 4 (Google 2026), as in transformers: z = W norm(x) / √D; g_i = s_i exp(z_i) / Σ_{j chosen} exp(z_j) for the k
    highest z_i, with a learned number s_i of each expert, which starts at 1. The norm's gain belongs to the router, so
    that the block around it may read the residual stream as it is. Balance losses use a softmax over all experts.

    Args:
        norm: of what the router reads
        top_k: k, experts per token
        balance: balance losses, one or a list; null for none
    """

    def __init__(
        self, d_model: int, n_experts: int, norm: Norm, top_k: Count = 2, balance: list[Balance] | None = None
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        self.norm = norm
        self.gain = nn.Parameter(torch.empty(n_experts))

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().child_context(child, known), "dim": known["d_model"]}

    def read(self, x: Tensor) -> Tensor:
        return self.norm(at_least_fp32(x)) * x.shape[-1] ** -0.5

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        weights, experts = highest(probs, self.top_k, experts)
        weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights * self.gain.to(weights.dtype)[experts], probs


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
