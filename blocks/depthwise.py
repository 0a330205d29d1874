"""Short causal convolutions of each channel over time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind


class Stretch(NamedTuple):
    """Consecutive inputs, of which the first ``past`` precede the T tokens that are computed.

    inputs: [B,past+T,W]
    segments: [B,past+T], their documents; None: each row is one
    """

    inputs: Tensor
    segments: Tensor | None

    def earlier(self, past: int, apart: int = 1) -> Iterator[Tensor]:
        """The inputs before each of the T, [B,T,W], zero where they are of another document.

        Args:
            past: tokens before a token that it sees
            apart: tokens from one of those seen to the next
        """
        T = self.inputs.shape[1] - past
        for lag in range(apart, past + 1, apart):
            before = slice(past - lag, past - lag + T)
            if self.segments is None:
                yield self.inputs[:, before]
            else:
                yield self.inputs[:, before] * (self.segments[:, past:] == self.segments[:, before])[..., None]


def stretch(u: Tensor, past: int, segments: Tensor | None, tail: Tensor | None = None) -> Stretch:
    """The T inputs u [B,T,W] behind those before them: ``tail`` [B,past,W], of the document of the first, or zeros."""
    before = u.new_zeros(len(u), past, u.shape[2]) if tail is None else tail.to(u.dtype)
    ids = None if segments is None else torch.cat((segments[:, :1].expand(-1, past), segments), 1)
    return Stretch(torch.cat((before, u), 1), ids)


def weighted(u: Tensor, earlier: Iterable[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_i w_i ⊙ u_i + b: inputs [B,T,W], and the taps − 1 before each, the nearest first, by a weight [W,taps]."""
    last = weight.shape[1] - 1
    y = u * weight[:, last] if bias is None else torch.addcmul(bias, u, weight[:, last])
    for lag, before in enumerate(earlier, start=1):
        y = torch.addcmul(y, before, weight[:, last - lag])
    return y


class CausalConv(nn.Module):
    """y_t = Σ_i w_i ⊙ u_{t−(taps−1−i)·dilation} + b: a depthwise convolution over earlier tokens of a document.

    A sum of shifted products instead of ``F.conv1d``, which would cross documents. The weight is [channels, taps]; in
    checkpoints of others it is [channels, 1, taps].

    Args:
        channels: W
        taps: tokens seen, the current one included
        bias: whether b is learned
        dilation: tokens from one of those seen to the next
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "filter"}

    def __init__(self, channels: int, taps: int, bias: bool = False, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Uniform in ±1/√taps, as torch's convolutions."""
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def forward(self, u: Tensor, segments: Tensor | None = None, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B,T,W] → the same shape, and the inputs with the P = (taps − 1)·dilation before them, [B,P+T,W].

        Args:
            segments: [B,T] document ids; the inputs before u are of none
            tail: the inputs before u, [B,P,W]; None for zeros
        """
        past = (self.weight.shape[1] - 1) * self.dilation
        held = stretch(u, past, segments, tail)
        return weighted(u, held.earlier(past, self.dilation), self.weight, self.bias), held.inputs
