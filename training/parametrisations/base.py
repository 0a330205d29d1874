"""The contract of ``parametrisation``: how initial values and rates of weights follow from the size of a model."""

from __future__ import annotations

from collections.abc import Mapping

from blockwright.blocks.scale import Scale
from blockwright.registry import Composable, family
from blockwright.training.optimizers.base import OptimizerRecipe


@family("parametrisation", root="", context=("model",))
class Parametrisation(Composable):
    """Factors on the initial scale, the learning rate, the decay and ε of every weight.

    Registered as ``@register("parametrisation", NAME)`` it is the option ``parametrisation=NAME`` at the root of a
    configuration; its constructor is its schema, as a block's is. It may also take ``model``, the complete composition
    of the run. The decoder and the optimizer of a run take its factors by the names of weights.
    """

    def __init__(self) -> None:
        """Nothing by default: a child declares its settings."""

    def scales(self, recipe: OptimizerRecipe) -> Mapping[str, Scale]:
        """Name of a weight → its factors; 1 for those that are not named.

        Args:
            recipe: of the run's optimizer, by whose steps rates are scaled

        Raises:
            ConfigError: at its setting
        """
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Lines to print before the run, about what the rules do not cover."""
        return []
