"""The contract of ``entry``: what enters each visit of a loop. A child of ``loop``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Kind
from blockwright.blocks.kernels.products import linear
from blockwright.registry import family, register
from blockwright.registry.ranges import NonNegative

Norm = Callable[[Tensor], Tensor]


@family("entry", context=("visits",), in_layers=False)
class Entry(Block):
    """Makes the input of a visit from the stream and from what entered the loop. Context: ``visits``, r.

    Class attributes:
        one_stream: whether it needs a residual stream [B,T,D]; else it works for several, [B,T,M,D], too
        injects: whether every visit reads what entered the loop, so that layers before it learn from the last visit
    """

    one_stream: ClassVar[bool] = True
    injects: ClassVar[bool] = False
    counted_as: ClassVar[str | None] = "loop"

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        """Streams [B,T,D] → [B,T,D], the input of the visit's first layer.

        Args:
            x: h, after the visit before; in the first visit ``entered``
            entered: e, what entered the loop
            n: index of the visit, from 0. There may be more of them than ``visits``
            norm: of the decoder, after its last layer
        """
        raise NotImplementedError

    def leave(self, x: Tensor, norm: Norm) -> Tensor:
        """The stream after the last visit → what the layers behind the loop read."""
        return x


@register("entry", "adapter")
class Adapter(Entry):
    """A matrix reads the state of the loop and what entered it, and the loop starts from noise.

    Huginn, arXiv 2502.05171: h ← core(W [h; e]) with h₀ ~ N(0, σ²), cut off at 3 σ; the layers behind the loop read
    norm(h), by the model's final norm, as in the released code. In evaluation h₀ is 0, where that code draws it unless
    it is asked for deterministic states: the tokens in a cache then do not depend on the draw.

    Args:
        noise: σ in training; √0.4 in Huginn. 0: the loop starts from zeros
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}
    injects: ClassVar[bool] = True

    def __init__(self, d_model: int, noise: NonNegative = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.empty(d_model, 2 * d_model))

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        h = x if n else self._start(entered)
        return linear(torch.cat((h, entered), -1), self.weight)

    def leave(self, x: Tensor, norm: Norm) -> Tensor:
        return norm(x)

    def _start(self, like: Tensor) -> Tensor:
        if not self.training or not self.noise:
            return torch.zeros_like(like)
        uniform = 2 * torch.rand(like.shape, device=like.device, dtype=torch.float32) - 1
        normal = 2**0.5 * (math.erf(3 / 2**0.5) * uniform).erfinv()  # between −3 and 3
        return (self.noise * normal).to(like.dtype)


@register("entry", "add")
class Add(Entry):
    """What entered the loop is added to each further visit: h ← core(h + e), in the first visit h ← core(e).

    Looped transformers, Yang et al. 2023, arXiv 2311.12424, with h₀ = 0; deep equilibrium models.
    """

    injects: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        return x + entered if n else x


@register("entry", "normed")
class Normed(Entry):
    """The model's final norm is between visits: h ← core(norm(h)), in the first visit h ← core(e).

    Ouro, arXiv 2510.25741, whose released code normalises the stream after every visit of the whole model by one norm.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        return norm(x) if n else x


@register("entry", "plain")
class Plain(Entry):
    """A visit reads what the visit before made: h ← core(h). So a loop is a deeper model with shared weights."""

    one_stream: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        return x
