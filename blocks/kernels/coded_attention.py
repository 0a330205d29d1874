"""Attention of few queries to a quantised cache, whose codes are read as they are: decoding.

Reading the keys and values dominates, and codes are a fraction of their bytes. A cache that is dequantised first is
written and read again as floats, which costs more than it saves. Here a part of the tokens at a time becomes floats, in
the processor's own caches, and is multiplied at once: the scores of every part, a softmax of all, then the weighted
sums of the values of every part, in fp32. The reference is attention to dequantised keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.kernels.attention import causal_attention, causal_attention_reference
from blockwright.blocks.kernels.latent_attention import latent_attention
from blockwright.blocks.kernels.products import by_mkl, reads_fast
from blockwright.blocks.kernels.quantise import Codes
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import kernel

FEW = 8  # queries a row; of more, products cost more than making floats of the codes
PART = 2**19  # bytes of a part's floats


class Products(NamedTuple):
    """How rows are multiplied with codes.

    scores: q [B,K,m,H] and keys → [B,K,m,S], fp32
    averages: weights [B,K,m,S] and values → [B,K,m,V], fp32
    """

    scores: Callable[[Tensor, Codes], Tensor]
    averages: Callable[[Tensor, Codes], Tensor]


def suits(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether queries are few, all see the same document without a window, and fp32 is wide enough for them."""
    plain = scoring.segments is None and scoring.window is None and q.dtype != torch.float64
    return plain and q.shape[1] <= FEW and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@kernel("coded_attention", "whole", order=30)
def coded_attention(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """Attention of the last T of S positions on all previous ones; here after all of them are dequantised.

    Args:
        q: [B,T,N,H]
        keys: of [B,S,K,H]; K divides N
        values: of [B,S,K,V]; the same codes as the keys where they are the first numbers of those, as of latents
        scoring: computation of the scores

    Returns:
        [B,T,N,V]
    """
    scale, bias = scoring.scale, dense(scoring.bias)
    k, S = keys.numbers(q.dtype), keys.codes.shape[1]
    if values.codes is keys.codes and scoring._replace(bias=None).plain:
        with by_mkl() if reads_fast(q) else nullcontext():
            return latent_attention(q, k[:, :, 0], S, values.width, scale, bias)
    v = k[..., : values.width] if values.codes is keys.codes else values.numbers(q.dtype)
    return causal_attention(q, k, v, scoring)


@kernel("coded_attention", "reference", automatic=False, order=40)
def coded_attention_reference(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same as the definition."""
    return causal_attention_reference(q, keys.numbers(q.dtype), values.numbers(q.dtype), scoring)


def suits_parts(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether it ``suits``, and parts win: of latents, which are keys and values, they would be made floats twice."""
    return values.codes is not keys.codes and suits(q, keys, values, scoring)


@kernel("coded_attention", "parts", devices=("cpu",), takes=suits_parts, order=20)
def attend_in_parts(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same by torch's operators, with some tokens' floats at a time."""
    return attend_by(Products(_scores, _averages), q, keys, values, scoring)


def attend_by(products: Products, q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """``coded_attention`` where it ``suits``, by some products."""
    B, T, N, _ = q.shape
    K, S, bias = keys.n_heads, keys.codes.shape[1], dense(scoring.bias)
    rows = (q.float() * scoring.scale).view(B, T, K, N // K, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = products.scores(rows, keys).view(B, N, T, S)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if bias is not None:
        scores += bias
    if T > 1:
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores[..., S - T :].masked_fill_(later, float("-inf"))
    weights = _softmax(scores, scoring.sinks).view(B, K, -1, S)
    return products.averages(weights, values).view(B, N, T, -1).transpose(1, 2).to(q.dtype)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over keys and, where there are any, a sink [N] whose value is nothing."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1].contiguous()


def _parts(of: Codes) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens at a time and their numbers [B,K,n,width]; the heads of a token lie side by side."""
    B, S = of.codes.shape[:2]
    together = max(16, PART // (4 * B * sum(of.sizes)))
    for start in range(0, S, together):
        tokens = slice(start, min(start + together, S))
        yield tokens, of.some(tokens).numbers(torch.float32).transpose(1, 2)


def _scores(q: Tensor, keys: Codes) -> Tensor:
    found = q.new_empty(*q.shape[:3], keys.codes.shape[1])
    with by_mkl() if reads_fast(q) else nullcontext():
        for tokens, k in _parts(keys):
            for row in range(len(q)):  # a batch of strided matrices is copied, one of strided heads is not
                found[row, :, :, tokens] = torch.bmm(q[row], k[row].transpose(1, 2))
    return found


def _averages(weights: Tensor, values: Codes) -> Tensor:
    found = weights.new_zeros(*weights.shape[:3], values.width)
    with by_mkl() if reads_fast(weights) else nullcontext():
        for tokens, v in _parts(values):
            for row in range(len(weights)):
                found[row] += torch.bmm(weights[row, :, :, tokens], v[row])
    return found
