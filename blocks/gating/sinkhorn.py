from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating
from blockwright.registry import register
from blockwright.registry.ranges import Count


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
