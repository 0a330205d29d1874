"""A short causal convolution of each channel over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalConv(nn.Module):
    """y_t = Σ_i w_i ⊙ u_{t−taps+1+i} + b: a depthwise convolution over the last ``taps`` tokens of a document.

    A sum of shifted products in place of ``F.conv1d``, which would cross documents. The weight is [channels, taps]; in
    checkpoints of others it is [channels, 1, taps].

    Args:
        channels: W
        taps: tokens seen, the current one included
        bias: whether b is learned
    """

    def __init__(self, channels: int, taps: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Uniform in ±1/√taps, as torch's convolutions."""
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def forward(self, u: Tensor, segments: Tensor | None = None, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B,T,W] → the same shape, and the inputs with the taps − 1 before them, [B,taps−1+T,W].

        Args:
            segments: [B,T] document ids; the inputs before u are of none
            tail: the inputs before u, [B,taps−1,W]; None for zeros
        """
        T, past = u.shape[1], self.weight.shape[1] - 1
        before = u.new_zeros(u.shape[0], past, u.shape[2]) if tail is None else tail.to(u.dtype)
        inputs = torch.cat((before, u), 1)
        y = u * self.weight[:, past] if self.bias is None else torch.addcmul(self.bias, u, self.weight[:, past])
        for lag in range(1, past + 1):
            earlier = inputs[:, past - lag : past - lag + T]
            if segments is not None and lag < T:
                same = segments[:, lag:] == segments[:, :-lag]
                earlier = earlier * torch.cat((same.new_ones(len(same), lag), same), 1)[..., None]
            y = torch.addcmul(y, earlier, self.weight[:, past - lag])
        return y, inputs
