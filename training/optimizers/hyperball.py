"""Hyperball: matrices keep their norm, and every step has a length of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockwright.registry.index import readable
from blockwright.training.optimizers.recipe import Constraint, Norms

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-30  # keeps a step without a gradient at zero


@readable
class Hyperball(Constraint):
    """Weights and updates of fixed Frobenius norms (Wen et al., 2026, arXiv:2606.16899).

    With u the direction of any optimizer, R = ‖θ₀‖_F and N(x) = x / ‖x‖_F::

        θ ← R · N(θ − lr · R · N(u))

    The learning rate is then the angle of a step, about 0.002 to 0.02, for every shape and optimizer; nothing decays.
    R is the norm at the run's first step, also where the run starts from trained weights. Where R is 0, as of an
    adapter's B, the optimizer's own step is made instead.

    Args:
        free: as of ``Constraint``. The paper holds the matrices of the network; embeddings, which are looked up, are
            held by none
    """

    def moved(self, weight: Tensor, update: Tensor, rate: float, radius: Tensor, norms: Norms) -> Tensor:
        step = weight + update * (rate * radius / norms(update).clamp(min=FLOOR))
        return step * (radius / norms(step).clamp(min=FLOOR))
