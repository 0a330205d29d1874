"""The contract of ``penalty``: what a departure from the reference policy costs, an estimate of a KL divergence."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from blockwright.registry import Composable, family
from blockwright.registry.ranges import Positive


@family("penalty", root="task")
class Penalty(Composable):
    """Adds ``beta`` times an estimate of KL(π ‖ reference) to the loss of each token. B completions, T tokens.

    Args:
        beta: weight of the estimate
    """

    def __init__(self, beta: Positive = 0.04) -> None:
        self.beta = beta

    @abstractmethod
    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        """The estimate for each token [B,T], without ``beta``.

        Args:
            logp: log-probability of each token under the policy [B,T], with its gradient
            reference: the same under the reference policy [B,T]
            old: the same under the policy that sampled [B,T]
        """


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """e^d − d − 1 with d = log reference − log π, which is never negative (Schulman 2020)."""
    d = reference - logp
    return d.exp() - d - 1
