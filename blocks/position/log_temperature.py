from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.base import Drawn
from blockwright.blocks.position.around import Around
from blockwright.blocks.position.base import Position
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("position", "log_temperature")
class LogTemperature(Around):
    """Queries that grow with the logarithm of their position, so that attention stays as sharp among more keys.

    Llama-4, from Nakanishi 2025 (scalable softmax), arXiv 2501.19399: q_t ← q_t (1 + scale · ln(1 + ⌊(t + 1)/every⌋)).
    Llama-4 has it in its layers without positions. A bias of ``inner`` does not grow: see ``log_scaled``.

    Args:
        inner: a further position block, called first; null for none
        scale: growth; 0.1 in Llama-4
        every: tokens between two steps; 8192 in Llama-4
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 3}  # seen within a few tokens

    def __init__(self, scale: Positive = 0.1, every: Count = 8192, inner: Position | None = None) -> None:
        super().__init__(inner)
        self.scale, self.every = scale, every

    def drawn(self) -> Drawn:
        return Drawn(acts="queries")

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate(q, k, positions)
        return self._grown(q, positions), k

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate_in(q, k, positions, length)
        return self._grown(q, positions), k

    def _grown(self, q: Tensor, positions: Tensor) -> Tensor:
        growth = 1 + self.scale * ((positions + 1) // self.every).float().log1p()
        return q * growth[..., None, None].to(q.dtype)
