"""The contract of ``convolution``: mix each token with the last few of its document. A child of other blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Drawn, Kind, Placement
from blockwright.blocks.depthwise import Stretch, stretch, weighted
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import family, register
from blockwright.registry.ranges import NonNegative


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


Taps = Annotated[int, Ge(2), Le(1024)]


@register("convolution", "canon")
class Canon(Convolution):
    """A Canon layer: each token receives a weighted sum of itself and of the last few, channel by channel.

    Allen-Zhu 2025 (Physics of Language Models 4.1), SSRN 5240330: u_t ← u_t + Σ_{i<taps} w_i ⊙ u_{t−i}. Where the paper
    places it: A on what attention reads and C on what the feed-forward block reads (``residual=convolved``), B on
    queries, keys and values, D on the hidden layer of the feed-forward block. Inkling has the same layer on keys, on
    values and on what both mixers return. The paper's code has one convolution for queries, keys and values; here they
    have one each, which computes the same, so that heads can be split over ranks. No bias, as in the paper's models.

    Args:
        taps: tokens seen, the current one included; 4 in the paper and in Inkling
        spread: the first weights are uniform in ±spread/√taps, 1 as torch's; 0 begins as the identity
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "filter"}
    scales: ClassVar[bool] = True

    def __init__(self, dim: int, taps: Taps = 4, spread: NonNegative = 1.0) -> None:
        super().__init__(dim, taps - 1)
        self.spread = spread
        self.weight = nn.Parameter(torch.empty(dim, taps))

    def reset_parameters(self) -> None:
        bound = self.spread * self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)

    def mix(self, u: Tensor, earlier: Iterable[Tensor]) -> Tensor:
        return u + weighted(u, earlier, self.weight)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": self.placement}


@register("convolution", "silu")
class SiLU(Convolution):
    """The short convolution of linear attentions: u_t ← silu(Σ_{i<taps} w_i ⊙ u_{t−i}), without a residual.

    Mamba, arXiv 2312.00752; Gated DeltaNet, arXiv 2412.06464, on queries, keys and values. ``gated_delta`` and its
    relatives have theirs built in. No bias.

    Args:
        taps: tokens seen, the current one included
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "filter"}

    def __init__(self, dim: int, taps: Taps = 4) -> None:
        super().__init__(dim, taps - 1)
        self.weight = nn.Parameter(torch.empty(dim, taps))

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)

    def mix(self, u: Tensor, earlier: Iterable[Tensor]) -> Tensor:
        return F.silu(weighted(u, earlier, self.weight))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": self.placement}
