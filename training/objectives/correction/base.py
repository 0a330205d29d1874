"""The contract of ``correction``: weights against the difference between sampler and trainer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from torch import Tensor

from blockwright.registry import Composable, family

Level = Literal["token", "sequence"]


@family("correction", root="task")
class Correction(Composable):
    """Factors on the surrogate loss of each token, without gradient; a penalty is not weighted.

    Letters: B completions, T tokens.
    """

    @abstractmethod
    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """Factors [B,T].

        Args:
            logp: log-probability of each token under the policy [B,T]
            old: the same under the policy at the time of the rollout, as the trainer computes it [B,T]
            sampler: the same as the sampler computed it [B,T]
            advantage: of each completion [B]
            mask: 1 for tokens of the completion, else 0 [B,T]
        """


def importance(old: Tensor, sampler: Tensor, mask: Tensor, level: Level) -> Tensor:
    """π_old / sampler of each token, or of its whole completion, the product over its tokens; [B,T]."""
    log = (old - sampler) * mask
    return (log if level == "token" else log.sum(1, keepdim=True).expand_as(log)).exp()
