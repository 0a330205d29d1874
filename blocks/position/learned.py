from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from blockwright.blocks.position.base import Position
from blockwright.registry import register


@register("position", "learned")
class Learned(Position):
    """A learned vector for each position, added to the embeddings.

    Radford et al. 2019 (GPT-2); Gehring et al. 2017, arXiv 1705.03122: x_t ← x_t + P[t]. Limited to the model's
    ``max_positions``.
    """

    place: ClassVar[Literal["attention", "embedding"]] = "embedding"

    def __init__(self, d_model: int, max_positions: int) -> None:
        super().__init__()
        self.limit = max_positions
        self.embedding = nn.Embedding(max_positions, d_model)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.embedding(positions)
