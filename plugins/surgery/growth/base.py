"""The contract of ``growth``: which layers of a shallow model a deeper one begins with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from blockwright.registry import Composable, family


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
