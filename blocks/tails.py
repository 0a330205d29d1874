"""What precedes the tokens of a pass, for blocks that see the last few: the contract of ``Pass.tails``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from blockwright.blocks.depthwise import Stretch


class Tails(ABC):
    """The inputs before those of a pass: of a cache, or of the ranks that hold the tokens before this rank's."""

    @abstractmethod
    def before(self, place: str, u: Tensor, past: int) -> Sequence[Stretch]:
        """The inputs of a block, each stretch behind the ``past`` inputs before it.

        Args:
            place: name of the block in its layer; it asks once in a pass
            u: [B,T,W], which are remembered
            past: number of inputs before a token that it sees

        Returns:
            stretches of [B,past+t,W], whose t add up to T, in the order of u
        """
