"""The contract of ``surrogate``: the loss of each token, whose gradient follows the advantage."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from blockwright.registry import Composable, family


class Surrogate(NamedTuple):
    """What a surrogate gives.

    loss: of each token [B,T], with its gradient
    low: whether the token was clipped because its ratio is too low [B,T]
    high: whether it was clipped because its ratio is too high [B,T]
    """

    loss: Tensor
    low: Tensor
    high: Tensor


@family("surrogate", root="task")
class SurrogateLoss(Composable):
    """The loss of each token of a completion. B completions, T tokens."""

    @abstractmethod
    def __call__(self, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        """Losses and what was clipped; their values where ``mask`` is 0 have no meaning.

        Args:
            logp: log-probability of each token under the policy [B,T], with its gradient
            old: the same under the policy that sampled [B,T]
            advantage: of each completion [B]
            mask: 1 for tokens of the completion, else 0 [B,T]
        """
