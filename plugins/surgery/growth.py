"""The contract of ``growth``: which layers of a shallow model a deeper one begins with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from blockwright.registry import Composable, ConfigError, family, register
from blockwright.registry.ranges import Whole


@family("growth", root="surgery")
class Growth(Composable):
    """Depth growth: layer i of the new model starts as some layer of the old one, perhaps without effect."""

    def __init__(self) -> None:
        pass

    @abstractmethod
    def sources(self, there: int, here: int) -> Sequence[int]:
        """For each of ``here`` layers, the index of the layer of ``there`` that it starts as."""

    def silent(self, there: int, here: int) -> frozenset[int]:
        """Layers that begin without effect: what they add to the residual stream is zero."""
        return frozenset()


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


@register("growth", "stacked")
class Stacked(Growth):
    """The whole stack again and again: layer i starts as layer i mod L.

    Du et al. 2024 (G_stack), arXiv 2405.15319: the best of eight ways to grow that they compare. Not exact.
    """

    def sources(self, there: int, here: int) -> Sequence[int]:
        return [i % there for i in range(here)]


@register("growth", "zeroed")
class Zeroed(Growth):
    """Copies between the layers, whose outputs begin at zero.

    Wu et al. 2024 (LLaMA-Pro), arXiv 2401.02415: after every few layers stands a copy of the last of them with its
    output matrices at zero. Exact where a layer adds to the residual stream. A shallower model keeps layers evenly
    spread, which is not exact.
    """

    def sources(self, there: int, here: int) -> Sequence[int]:
        return [i * there // here for i in range(here)]

    def silent(self, there: int, here: int) -> frozenset[int]:
        sources = self.sources(there, here)
        return frozenset(i for i in range(1, here) if sources[i] == sources[i - 1])
