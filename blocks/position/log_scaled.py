from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockwright.blocks.base import Drawn, Keys, Queries
from blockwright.blocks.kernels.scoring import Bias, times
from blockwright.blocks.position.around import Around
from blockwright.blocks.position.base import Position
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("position", "log_scaled")
class LogScaled(Around):
    """Scores that grow with the logarithm of the query's position from a floor on, those of ``inner``'s bias too.

    Inkling (Thinking Machines 2026), as in transformers: all scores of query t, and their bias, are multiplied by
    1 + scale · ln(max((t + 1)/floor, 1)). Products with the factor are rounded once, to the
    queries' precision.

    Args:
        inner: the position whose scores grow; null for none
        scale: growth; 0.1 in Inkling
        floor: tokens up to which nothing grows
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"floor": 3}  # seen within a few tokens

    def __init__(self, scale: Positive = 0.1, floor: Count = 128000, inner: Position | None = None) -> None:
        super().__init__(inner)
        self.scale, self.floor = scale, floor

    def drawn(self) -> Drawn:
        return Drawn(acts="scores")

    def growth(self, positions: Tensor) -> Tensor:
        """[B|1,T] fp64."""
        return 1 + self.scale * ((positions + 1).double() / self.floor).clamp(min=1).log()

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate(q, k, positions)
        return self._grown(q, positions), k

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate_in(q, k, positions, length)
        return self._grown(q, positions), k

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        return times(super().bias(queries, keys), self.growth(queries.positions))

    def _grown(self, q: Tensor, positions: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q.to(wide) * self.growth(positions)[..., None, None].to(wide)).to(q.dtype)
