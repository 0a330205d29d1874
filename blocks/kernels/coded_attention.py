"""Caches of 8, 6 or 4 bits a number with a scale per group of adjacent numbers, and attention that reads their codes.

In decoding, reading the keys and values dominates, and codes are a fraction of their bytes. A cache that is dequantised
first is written and read again as floats, which costs more than it saves. Here a part of the tokens at a time becomes
floats, in the processor's own caches, and is multiplied at once: the scores of every part, a softmax of all, then the
weighted sums of the values of every part, in fp32. The reference is attention to dequantised keys and values.

On a GPU two Triton kernels do this (triton_products.py). They were not run on one by this project so far: Triton's
interpreter computes them on a CPU, and they are compiled for A100, H100 and B200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.kernels.attention import causal_attention, causal_attention_reference, latent_attention
from blockwright.blocks.kernels.products import by_mkl, reads_fast
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.kernels.seam import kernel

BITS = (8, 6, 4)
GROUP = 64  # maximum numbers per scale: 16 bits of scale add a quarter of a bit per number


class Codes(NamedTuple):
    """Numbers of tokens as they are stored: K heads of H each, which are not dequantised.

    codes: [B,S,code_bytes] uint8
    scales: [B,S,groups] bf16
    bits: per number
    sizes: of the groups of a token; no group reaches over two heads
    n_heads: K
    width: numbers of each head that are meant, from its first on: H, or fewer where they end with a group
    """

    codes: Tensor
    scales: Tensor
    bits: int
    sizes: tuple[int, ...]
    n_heads: int
    width: int

    @property
    def head(self) -> int:
        """H, numbers of a head."""
        return sum(self.sizes) // self.n_heads

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups that make up the ``width`` of a head."""
        own, ends = self.sizes[: len(self.sizes) // self.n_heads], 0
        for n, size in enumerate(own):
            if ends == self.width:
                return own[:n]
            ends += size
        return own

    def some(self, tokens: slice) -> Codes:
        """Those of some tokens; views."""
        return self._replace(codes=self.codes[:, tokens], scales=self.scales[:, tokens])

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """[B,S,K,width], dequantised."""
        every = dequantise(self.codes, self.scales, self.bits, self.sizes, dtype)
        return every.unflatten(-1, (self.n_heads, -1))[..., : self.width]


def group_sizes(parts: Sequence[int], most: int = GROUP) -> list[int]:
    """Group sizes: every part is split evenly into as few groups of at most ``most`` as possible.

    Args:
        parts: widths of adjacent parts that share no scale (heads, a latent and its rotary part)
    """
    sizes = []
    for width in parts:
        n = -(-width // most)
        sizes += [width // n + (i < width % n) for i in range(n)]
    return sizes


def code_bytes(width: int, bits: int) -> int:
    """Bytes of the codes of ``width`` numbers."""
    return {8: width, 6: 3 * -(-width // 4), 4: -(-width // 2)}[bits]


def quantise(x: Tensor, bits: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Round each number to one of 2^bits − 1 levels, symmetric around 0 and scaled to its group's largest.

    scale = max|x| / (2^(bits−1) − 1), code = round(x / scale) + 2^(bits−1). Scales are bf16, which covers every value's
    range, and codes use the rounded scale, so that its rounding adds no error.

    Args:
        x: [...,W]
        sizes: of the groups; they sum to W

    Returns:
        codes [...,code_bytes] uint8, scales [...,groups] bf16
    """
    top = 2 ** (bits - 1) - 1
    groups = _groups(x.float(), sizes)
    scales = (torch.cat([group.abs().amax(-1) for group in groups], -1) / top).to(torch.bfloat16)
    divisors = _of_groups(scales.float().clamp(min=torch.finfo(torch.float32).tiny), groups)
    rounded = torch.cat([(group / by).flatten(-2) for group, by in zip(groups, divisors, strict=True)], -1).round_()
    return pack((rounded.clamp_(-top, top) + (top + 1)).to(torch.uint8), bits), scales


@kernel("coding", "torch", order=20)
def store(x: Tensor, into: Codes) -> Codes:
    """Quantise tokens.

    Args:
        x: [B,T,W]
        into: codes and scales of as many tokens, which are overwritten

    Returns:
        ``into``
    """
    codes, scales = quantise(x, into.bits, into.sizes)
    into.codes.copy_(codes)
    into.scales.copy_(scales)
    return into


def dequantise(codes: Tensor, scales: Tensor, bits: int, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantise``, up to rounding: [...,W] in ``dtype``."""
    x = unpack(codes, bits, sum(sizes)).to(dtype).sub_(2 ** (bits - 1))
    groups = _groups(x, sizes)
    for group, scale in zip(groups, _of_groups(scales.to(dtype), groups), strict=True):
        group.mul_(scale)
    return x


def _groups(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views [...,n,size] of x [...,W], one of each run of groups of one size."""
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    parts = x.split([size * n for size, n in runs], -1)
    return [part.unflatten(-1, (n, size)) for part, (size, n) in zip(parts, runs, strict=True)]


def _of_groups(scales: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    """[...,groups] → [...,n,1], as ``_groups``."""
    return [part[..., None] for part in scales.split([group.shape[-2] for group in groups], -1)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [...,W] uint8 below 2^bits → [...,code_bytes].

    At 4 bits the two halves of W are in the low and high half of each byte. At 6, three quarters of W are in the low 6
    bits of three runs of bytes, and the fourth is spread over their high 2, so that whole runs are processed at once.
    """
    if bits == 8:
        return codes
    if bits == 4:
        low, high = _runs(codes, 2).unbind(-2)
        return low | high << 4
    runs, shifts = _runs(codes, 4), torch.arange(0, 6, 2, dtype=torch.uint8, device=codes.device)[:, None]
    return (runs[..., :3, :] | (runs[..., 3:, :] >> shifts & 3) << 6).flatten(-2)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of ``pack``: [...,width]."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.cat((packed & 15, packed >> 4), -1)[..., :width]
    high = (packed >> 6).unflatten(-1, (3, -1))
    fourth = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4
    return torch.cat((packed & 63, fourth), -1)[..., :width]


def _runs(codes: Tensor, n: int) -> Tensor:
    """Codes [...,W] → [...,n,⌈W/n⌉], zero-padded at the end."""
    missing = -codes.shape[-1] % n
    return (torch.nn.functional.pad(codes, (0, missing)) if missing else codes).unflatten(-1, (n, -1))


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


MOST = 64  # rows of a head, whose products with a block of tokens are held in registers


def triton_suits(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> bool:
    """Whether ``parts`` could compute it, the rows of a head are not too many, and a sequence not too long."""
    rows = q.shape[1] * q.shape[2] // keys.n_heads
    near = all(of.codes[0].numel() < 2**31 for of in (keys, values))  # of which the kernels count 32 bits
    return near and rows <= MOST and suits(q, keys, values, scoring)


@kernel("coded_attention", "triton", devices=("cuda",), capability=(8, 0), needs="triton", takes=triton_suits, order=10)
def triton_attention(q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
    """The same by Triton."""
    from blockwright.blocks.kernels.triton_products import averages, scores

    return attend_by(Products(scores, averages), q, keys, values, scoring)
