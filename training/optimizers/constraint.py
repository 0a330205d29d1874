"""The contract of a constraint: where the matrices of a model may be after a step of any optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from blockwright.registry.enforcing import enforced
from blockwright.training.patterns import matches

if TYPE_CHECKING:
    from torch import Tensor

    from blockwright.blocks.weights import Weight

USUAL = ("embedding", "head", "gating")  # whose matrices are no hidden ones; not every model has all of them
Norms = Callable[["Tensor"], "Tensor"]  # of a tensor like the weight, over ``dims``, which are kept; over all ranks


class Constraint(ABC):
    """Where the matrices that it holds may be. An optimizer gives a direction; the constraint makes the step.

    A recipe takes it as ``constraint``, and its settings are its constructor's, plain values. Each expert of a stack
    (E, a, b) is a matrix of its own. Decay of a weight that is held is left out: the constraint sets its size. A matrix
    that begins at 0, or a row where ``dims`` are those of rows, has no size to keep: it takes the optimizer's own step.

    Args:
        free: patterns of parameter names that are not held (training/patterns.py). The norm of the head's rows is the
            sharpness of the model's predictions, and that of a router's the sharpness of its choice

    Class attributes:
        dims: over which the norms are taken: (-2, -1) for those of matrices, (-1,) for those of rows, which are those
            of output neurons
    """

    dims: ClassVar[tuple[int, ...]] = (-2, -1)

    def __init__(self, free: Sequence[str] = USUAL) -> None:
        self.free = tuple(free)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        enforced("optimizer.constraint")(cls)

    def holds(self, weight: Weight) -> bool:
        """Whether it is a matrix that is held: no table, vector or filter, and none with a side of 1."""
        return hidden(weight, self.free)

    @abstractmethod
    def moved(self, weight: Tensor, update: Tensor, rate: float, radius: Tensor, norms: Norms) -> Tensor:
        """The weight after a step.

        Args:
            weight: [..., a, b], or this rank's part of it
            update: like the weight; what the optimizer would add, up to a factor above 0
            rate: learning rate of the step
            radius: the norms of the weight before the first step
            norms: of a tensor like the weight
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def hidden(weight: Weight, but: Sequence[str]) -> bool:
    """Whether it is a matrix or a stack of them, with no side of 1, whose names no pattern of ``but`` matches."""
    is_map = weight.kind == "matrix" and min(weight.parameter.shape[-2:]) > 1
    return is_map and not any(matches(name, pattern) for name in weight.names for pattern in but)
