"""What a decoder needs to know of sequences whose tokens are spread over ranks (context parallelism)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.tails import Tails


class Share(ABC):
    """One rank's tokens of the sequences of a batch; the other tokens are on other ranks.

    Everything but attention and convolutions works on single tokens, and so on this rank's alone. See
    training/parallel/context.py.
    """

    @abstractmethod
    def take(self, whole: Tensor) -> Tensor:
        """[B|1,T',…] of whole sequences → [B|1,t,…] of this rank's tokens, in their order.

        Args:
            whole: of all T tokens, or of the first T' of them, as depths of multi-token prediction have
        """

    @abstractmethod
    def tails(self, segments: Tensor | None) -> Tails:
        """What other ranks have before this rank's tokens, for one layer of a pass.

        Args:
            segments: [B,T'] of the whole sequences
        """

    @abstractmethod
    def attend(self, attention: Attention, x: Tensor, given: Pass) -> Tensor:
        """Attention of this rank's tokens on those of all ranks.

        Args:
            x: [B,t,D] of this rank's tokens
            given: its ``losses`` are filled with the attention's, of which the mean over ranks is that over all tokens

        Returns:
            [B,t,D]
        """
