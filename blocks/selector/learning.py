"""What an indexer learns from: the attention's weights, and how far its own are from them."""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.precision import at_least_fp32


@torch.no_grad()
def attention_weights(q: Tensor, k: Tensor, scale: float, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights of an attention, averaged over its heads.

    Args:
        q: [B,t,N,H]
        k: [B,S,K,H]; N is a multiple of K
        scale: multiplies q·k
        visible: [B|1,t,S]
        bias: [B|1,N|1,t,S] added to the scaled scores

    Returns:
        [B,t,S] in fp32 or more; those of a query that sees nothing are finite and mean nothing
    """
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = at_least_fp32(torch.einsum("btkgh,bskh->bkgts", grouped, k)).flatten(1, 2) * scale
    scores = scores if bias is None else scores + bias
    hidden = ~visible & visible.any(-1, keepdim=True)
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1).mean(1)


def divergence(target: Tensor, scores: Tensor, possible: Tensor) -> Tensor:
    """Σ KL(p ‖ softmax scores) over queries, p the target made to sum to 1; queries without candidates count as 0.

    Args:
        target: [B,t,n], not negative
        scores: [B,t,n]
        possible: [B|1,t,n], the candidates over which both are distributions
    """
    any_possible = possible.any(-1, keepdim=True)
    target = target * possible
    p = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    log_s = scores.masked_fill(~possible & any_possible, float("-inf")).log_softmax(-1)
    return (torch.xlogy(p, p) - p * log_s.masked_fill(~possible, 0.0)).sum()
