"""Quantisation to 8, 6 or 4 bits with a scale per group of adjacent numbers, for caches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

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
