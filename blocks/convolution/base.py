"""The contract of ``convolution``: mix each token with the last few of its document. A child of other blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.base import Block, Placement
from blockwright.blocks.depthwise import Stretch, stretch
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import family


@family("convolution", context=("dim",))
class Convolution(Block):
    """Any block takes one as a child, wherever it has a tensor [B,T,W] of its tokens: on what a projection gives, in
    the hidden width of a feed-forward block, around a mixer. It names the width by ``child_context``, as ``dim``, and
    calls ``convolved(self.key_conv, k, given)``, where None convolves nothing.

    A subclass has ``mix``. The tail, which is the last ``past`` inputs, is remembered by the layer: prompts in parts,
    packed documents, padding, drafts, running batches and sequences spread over ranks need nothing more.

    Class attributes:
        scales: whether a factor on its input is one on its output

    Args:
        dim: W, channels
        past: tokens before the current one that it sees

    Attributes:
        place: its name in its layer, set by the layer, under which its tail is remembered
        placement: ``column``, as the rows of the projection before it; a block sets ``replicate`` where these are not
            split
    """

    scales: ClassVar[bool] = False
    place: str = ""
    placement: Placement = "column"

    def __init__(self, dim: int, past: int) -> None:
        super().__init__()
        self.dim, self.past = dim, past

    def mix(self, u: Tensor, earlier: Iterable[Tensor]) -> Tensor:
        """Inputs [B,T,W], and those 1, 2, … ``past`` tokens before each, zero beyond its document → [B,T,W]."""
        raise NotImplementedError

    def forward(self, u: Tensor, given: Pass | None = None) -> Tensor:
        """Inputs [B,T,W] of the tokens of a pass → [B,T,W]; without a pass each row is a document."""
        if given is None or given.tails is None:
            stretches: Sequence[Stretch] = [stretch(u, self.past, None if given is None else given.segments)]
        else:
            stretches = given.tails.before(self.place, u, self.past)
        mixed = [self.mix(each.inputs[:, self.past :], each.earlier(self.past)) for each in stretches]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)

    @property
    def tail(self) -> tuple[int, int]:
        """Shape of what is remembered of it."""
        return self.past, self.dim

    def drawn(self) -> Drawn:
        return Drawn((f"over {self.past + 1} tokens",))


def convolved(convolution: Convolution | None, u: Tensor, given: Pass | None) -> Tensor:
    """What a child makes of inputs [B,T,W]; these where there is none."""
    return u if convolution is None else convolution(u, given)
