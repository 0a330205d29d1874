"""The contract of ``teaching``: what a model learns from the one that it was made from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.documents import is_real
from blockwright.registry import Composable, family


@dataclass(frozen=True)
class Lesson:
    """A batch, and the two models.

    Args:
        student: learns
        teacher: frozen, in evaluation mode
        tokens, targets: [B,T]; targets of −100 are not scored
        positions, segments: as for ``Decoder.hidden``
    """

    student: Decoder
    teacher: Decoder
    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """[B,T], which are tokens and not padding; None for all."""
        return None if self.segments is None else is_real(self.segments)

    @property
    def given(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What both models read."""
        return self.tokens, self.positions, self.segments


@family("teaching", root="task")
class Teaching(Composable):
    """A loss of the student."""

    def __init__(self) -> None:
        pass

    @abstractmethod
    def __call__(self, lesson: Lesson) -> tuple[Tensor, Sequence[Routing | None]]:
        """The loss of each token [B,T] with its gradient, and the routings of the student's layers."""
