"""Gates that are balanced by how they choose."""

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

    def pairs(self, experts: Tensor) -> int | None:
        return self._capacity(len(experts)) * self.n_experts


@register("gating", "sinkhorn")
class Sinkhorn(LinearGating):
    """Balanced assignment of the batch's tokens by Sinkhorn iterations during training; plain top-k in evaluation.

    Clark et al. 2022 (S-BASE), arXiv 2202.01169: exp(W x), [T,E], is scaled alternately to rows that sum to 1/T and
    columns that sum to 1/E; the k highest entries of a row are its experts. Weights are the unscaled affinities there:
    their softmax over experts, or, for k = 1, their sigmoid, as in Megatron-LM.

    The scaling carries no gradient. It uses the whole batch, so in training the choice for a token depends on later
    ones; in evaluation it is the k highest logits, which is causal. The number of iterations is fixed, without the
    tolerance of other implementations, which needs a data-dependent loop.

    Args:
        top_k: k, experts per token
        iterations: of the scaling
        balance: additional balance losses, one or a list; null for none
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 1,
        iterations: Count = 8,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        self.iterations = iterations

    def choose(self, logits: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.sigmoid() if self.top_k == 1 else logits.softmax(-1)
        scores = balanced(logits.detach(), self.iterations, real) if self.training else logits
        experts = scores.topk(self.top_k).indices
        return experts, probs.gather(1, experts), probs


def balanced(logits: Tensor, iterations: int, real: Tensor | None = None) -> Tensor:
    """log of exp(logits), [T,E], scaled so that all columns have nearly the same sum, and all rows too.

    Args:
        real: [T], which rows are tokens; those of padding are in no sum of a column. None for all
    """
    counted = torch.zeros_like(logits[:, :1])
    if real is not None:
        counted = counted.masked_fill(~real[:, None], float("-inf"))
    rows, columns = torch.zeros_like(logits[:, :1]), torch.zeros_like(logits[:1])
    for _ in range(iterations):
        columns = -(logits + rows + counted).logsumexp(0, keepdim=True)
        rows = -(logits + columns).logsumexp(1, keepdim=True)
    return logits + rows + columns
