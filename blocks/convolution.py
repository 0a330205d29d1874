"""A short causal convolution of each channel over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalConv(nn.Module):
    """y_t = Σ_i w_i ⊙ u_{t−(taps−1−i)·dilation} + b: a depthwise convolution over earlier tokens of a document.

    A sum of shifted products in place of ``F.conv1d``, which would cross documents. The weight is [channels, taps]; in
    checkpoints of others it is [channels, 1, taps].

    Args:
        channels: W
        taps: tokens seen, the current one included
        bias: whether b is learned
        dilation: tokens from one of those seen to the next
    """

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
        T, last = u.shape[1], self.weight.shape[1] - 1
        past = last * self.dilation
        before = u.new_zeros(u.shape[0], past, u.shape[2]) if tail is None else tail.to(u.dtype)
        inputs = torch.cat((before, u), 1)
        y = u * self.weight[:, last] if self.bias is None else torch.addcmul(self.bias, u, self.weight[:, last])
        for tap in range(1, last + 1):
            lag = tap * self.dilation
            earlier = inputs[:, past - lag : past - lag + T]
            if segments is not None and lag < T:
                same = segments[:, lag:] == segments[:, :-lag]
                earlier = earlier * torch.cat((same.new_ones(len(same), lag), same), 1)[..., None]
            y = torch.addcmul(y, earlier, self.weight[:, last - tap])
        return y, inputs
