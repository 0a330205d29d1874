"""The shared base of positions that change what another one does."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.kernels.scoring import Bias
from blockwright.blocks.position.base import Position


class Around(Position):
    """A position around another, whose hooks it passes on.

    Args:
        inner: the other one; None for none
    """

    def __init__(self, inner: Position | None) -> None:
        super().__init__()
        self.inner = inner
        if inner is not None:
            self.softmax_scale, self.limit, self.boundary = inner.softmax_scale, inner.limit, inner.boundary

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.inner is None else self.inner.rotate(q, k, positions)

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.inner is None else self.inner.rotate_in(q, k, positions, length)

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        return None if self.inner is None else self.inner.bias(queries, keys)

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {} if self.inner is None else self.inner.slots()

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return () if self.inner is None else self.inner.remember(x, positions, declared)
