"""Rows of matrices on spheres: each output neuron keeps its norm, and all turn by the same angle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockwright.registry.index import readable
from blockwright.training.optimizers.recipe import Constraint, Norms

if TYPE_CHECKING:
    from torch import Tensor


@readable
class RowSphere(Constraint):
    """θ ← R N(θ − lr R N(u)), with N and R of each row instead of the matrix."""

    dims = (-1,)

    def moved(self, weight: Tensor, update: Tensor, rate: float, radius: Tensor, norms: Norms) -> Tensor:
        step = weight + update * (rate * radius / norms(update).clamp(min=1e-30))
        return step * (radius / norms(step).clamp(min=1e-30))
