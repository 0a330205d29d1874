"""Sums of windows of tokens: where windows close, and the learned mean that each becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32


class Ends(NamedTuple):
    """The tokens at which windows close, n of each row, those without a window last.

    at: [B,n], indices of the tokens in their rows
    number: [B,n] of the window in its document, from 0; where none closes that of the row's open window
    real: [B,n], whether there is such a token
    """

    at: Tensor
    number: Tensor
    real: Tensor


def ends_of(positions: Tensor, every: int) -> Ends:
    """The tokens at positions [B,T] that are the last of a window of ``every`` tokens of their document.

    n is the most that T tokens in one run can have; it does not depend on the numbers, so that nothing waits for them.
    """
    last = (positions + 1) % every == 0
    n = -(-positions.shape[1] // every)
    index = last.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
    real, still_open = last.gather(1, index), (positions[:, -1:] + 1) // every
    return Ends(index, torch.where(real, positions.gather(1, index) // every, still_open), real)


class Pool(nn.Module):
    """The mean of a window's tokens, weighted in each channel by a softmax over the window.

    With u = W_value x, z = W_gate x and a bias b of each place in the window: Σ_j softmax_j(z_j + b_j) ⊙ u_j. One that
    overlaps has channels twice: window w is the mean of the first ones over window w − 1 and of the second ones over
    window w.

    Args:
        d_model: D
        width: W of the mean
        every: tokens of a window
        overlapping: whether the mean is over the window before as well
        apart: whether nothing that it reads follows its gradient
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"place": "table"}

    def __init__(self, d_model: int, width: int, every: int, overlapping: bool, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.width, self.every, self.parts = width, every, 2 if overlapping else 1
        self.value = Linear(d_model, self.parts * width, bias=False)
        self.gate = Linear(d_model, self.parts * width, bias=False)
        self.place = nn.Parameter(torch.empty(every, self.parts * width))

    @property
    def span(self) -> int:
        """Tokens that a mean is over."""
        return self.parts * self.every

    def project(self, x: Tensor) -> Tensor:
        """Tokens [B,T,D] → what their windows need of them, [B,T,2·parts·W]."""
        x = x.detach() if self.apart else x
        return torch.cat((self.value(x), self.gate(x)), -1)

    def forward(self, projected: Tensor, index: Tensor, number: Tensor) -> Tensor:
        """Means [B,n,W] of windows.

        Args:
            projected: [B,S,2·parts·W], what ``project`` gave for tokens in a run
            index: [B,n], where in them the windows close. What lies before the first is left out
            number: [B,n], of the windows in their documents
        """
        places = index[..., None] - torch.arange(self.span - 1, -1, -1, device=index.device)
        there = places >= 0
        if self.parts == 2:  # nothing before the first window
            there = there & ((number > 0)[..., None] | (torch.arange(self.span, device=index.device) >= self.every))
        values, gates = projected.chunk(2, -1)
        u, z = self._gathered(values, places), self._gathered(gates, places)
        bias = torch.cat(self.place.chunk(self.parts, -1)) if self.parts == 2 else self.place
        weights = (at_least_fp32(z) + bias).masked_fill(~there[..., None], float("-inf")).softmax(2)
        return (u * weights.to(u.dtype)).sum(2)

    def _gathered(self, channels: Tensor, places: Tensor) -> Tensor:
        """Of tokens' channels [B,S,parts·W] those of each window, [B,n,span,W]."""
        rows = torch.arange(len(channels), device=channels.device)[:, None, None]
        found = [
            part[rows, at.clamp(min=0)]
            for part, at in zip(channels.split(self.width, -1), places.split(self.every, -1), strict=True)
        ]
        return torch.cat(found, 2) if len(found) > 1 else found[0]
