from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.depthwise import weighted
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative

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
