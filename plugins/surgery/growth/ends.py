from __future__ import annotations

from collections.abc import Sequence

from blockwright.plugins.surgery.growth.base import Growth
from blockwright.registry import ConfigError, register
from blockwright.registry.ranges import Whole


@register("growth", "ends")
class Ends(Growth):
    """The first layers and the last ones of a deeper model; those in the middle are dropped. Not exact.

    So a loop is made of a trained model, as McLeish et al. 2025, arXiv 2511.07384, do: the first layers become its
    prelude, the last ones its core and its coda.

    Args:
        front: how many of the new layers are the old model's first ones
    """

    def __init__(self, front: Whole = 1) -> None:
        self.front = front

    def sources(self, there: int, here: int) -> Sequence[int]:
        if not self.front <= here <= there:
            rule = f"keeps the first {self.front} and the last of {there} layers, and the new model has {here}"
            remedy = "Lower it, or make the new model shallower than the trained one"
            raise ConfigError("surgery.growth.front", self.front, rule, remedy)
        return [*range(self.front), *range(there - here + self.front, there)]
