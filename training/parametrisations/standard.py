from __future__ import annotations

from collections.abc import Mapping

from blockwright.blocks.scale import Scale
from blockwright.registry import register
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parametrisations.base import Parametrisation


@register("parametrisation", "standard")
class Standard(Parametrisation):
    """One initial deviation and one rate for all weights, whatever their size: no factors."""

    def scales(self, recipe: OptimizerRecipe) -> Mapping[str, Scale]:
        return {}
