"""The contract of ``average``: how the losses of tokens become the loss of an optimizer step."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from blockwright.registry import Composable, family


@family("average", root="task", context=("max_new_tokens",))
class Average(Composable):
    """Weights of tokens, and the number that their weighted sum is divided by. B completions, T tokens.

    The number is summed over all micro-batches and ranks of the optimizer step before the division, so accumulation and
    data parallelism do not change the loss. Token means of each micro-batch, as in TRL's ``bnpo``, would.
    """

    @abstractmethod
    def weights(self, mask: Tensor) -> Tensor:
        """The weight of each token [B,T], 0 where the mask [B,T] is."""

    @abstractmethod
    def count(self, mask: Tensor) -> Tensor:
        """What these completions add to the number to divide by, a scalar integer."""
