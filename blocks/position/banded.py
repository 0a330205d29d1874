from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Drawn, Keys, Kind, Placement, Queries, number
from blockwright.blocks.kernels.scoring import Band, Bias, dense
from blockwright.blocks.linear import Linear
from blockwright.blocks.position.around import Around
from blockwright.blocks.position.base import Position
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("position", "banded")
class Banded(Around):
    """A learned bias by distance, which every query mixes for each of its heads from a bank of profiles.

    Inkling (Thinking Machines 2026), as in transformers: with r_t = W x_t, [N,rank], and a bank P [rank,extent] that
    all heads of a layer share, score_n(t, s) += r_t,n · P[:, t − s] for 0 ≤ t − s < extent, and nothing beyond. It is
    Inkling's only position: nothing is rotated. The cache holds nothing of it. Here it may be added to another one.

    Args:
        rank: numbers that a head makes of a query; 16 in Inkling
        extent: tokens that the bias reaches back, the query's own included; 1,024 in Inkling, and the window where
            there is one
        inner: a further position, whose bias is added; null, as in Inkling, for none
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"bank": "table"}
    conformance_settings: ClassVar[Mapping[str, Any]] = {"rank": 3, "extent": 5}

    def __init__(
        self, d_model: int, n_heads: int, rank: Count = 16, extent: Count = 1024, inner: Position | None = None
    ) -> None:
        super().__init__(inner)
        self.mixture = Linear(d_model, n_heads * rank, bias=False)
        self.bank = nn.Parameter(torch.empty(rank, extent))

    def drawn(self) -> Drawn:
        rank, extent = self.bank.shape
        return Drawn((f"{number(rank)} profiles of {number(extent)} distances",), acts="scores")

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        mixture = self.mixture(queries.x).unflatten(-1, (-1, len(self.bank)))
        band = Band(mixture @ self.bank.to(mixture.dtype), queries.positions, keys.positions)
        further = dense(super().bias(queries, keys))
        return band if further is None else band.dense() + further

    def neutral(self) -> dict[str, Tensor]:
        return {"bank": torch.zeros_like(self.bank)}

    def parallel_plan(self) -> dict[str, Placement]:
        return {"mixture.weight": "column"}
