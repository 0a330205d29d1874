from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("gating", "expert_choice")
class ExpertChoice(LinearGating):
    """Experts choose tokens, instead of tokens experts: the load is even by construction.

    Zhou et al. 2022, arXiv 2202.09368: S = softmax(W x) over experts, [T,E]; each expert takes the k T / E tokens of
    the batch that have the highest S in its column, with S as weight. A token is taken by any number of experts, k on
    average, or by none. T counts the tokens without padding.

    Which tokens an expert takes depends on all tokens of the batch, later ones included: a language model trained with
    it sees a little of the future in its training loss, and generates under another rule than it was trained with. It
    is here as the comparison that papers make, not for serving.

    Args:
        top_k: k, experts per token on average (the paper's capacity factor)
        balance: balance losses, one or a list; null for none, since the load is even anyway
    """

    causal: ClassVar[bool] = False
    independent: ClassVar[bool] = False

    def __init__(self, d_model: int, n_experts: int, top_k: Count = 2, balance: list[Balance] | None = None) -> None:
        super().__init__(d_model, n_experts, top_k, balance)

    def choose(self, logits: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs, E = logits.softmax(-1), self.n_experts
        scores = probs if real is None else probs.masked_fill(~real[:, None], -1)
        taken = scores.topk(self._capacity(len(probs)), dim=0).indices  # [c,E]
        within: bool | Tensor = True
        if real is not None:  # padding is last, and the capacity of the tokens a number that the host need not know
            capacity = (real.sum() * self.top_k // E).clamp(min=1)
            within = (torch.arange(len(taken), device=taken.device) < capacity)[:, None].expand_as(taken)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(0, taken, within)
        experts = torch.where(chosen, torch.arange(E, device=probs.device), E)  # a column per expert, E: not chosen
        return experts, probs * chosen, probs

    def _capacity(self, n_tokens: int) -> int:
        return min(n_tokens, max(1, n_tokens * self.top_k // self.n_experts))

    def pairs(self, n_tokens: int) -> int | None:
        return self._capacity(n_tokens) * self.n_experts
