"""The objective of policy optimisation, put together from its parts; each part is a registered kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockwright.training.objectives.average.base import Average
from blockwright.training.objectives.correction.base import Correction
from blockwright.training.objectives.penalty.base import Penalty
from blockwright.training.objectives.surrogate.base import SurrogateLoss


@dataclass(frozen=True)
class Completions:
    """What was sampled, and what the sampling policy thought of it. B completions, T tokens.

    Args:
        old: log-probability of each token under the policy at the time of the rollout [B,T]
        advantage: of each completion [B]
        mask: 1 for tokens that are scored, else 0 [B,T]
        sampler: log-probabilities as the sampler computed them [B,T]; None where only a correction would need them
        reference: log-probabilities under the reference policy [B,T]; None without a penalty
    """

    old: Tensor
    advantage: Tensor
    mask: Tensor
    sampler: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyObjective:
    """J = average of surrogate × correction + beta × penalty, of each token.

    Args:
        surrogate: the loss that follows the advantage
        average: of the tokens' losses
        penalty: on the distance from a reference policy, if any
        correction: weights against the difference of sampler and trainer, if any
    """

    surrogate: SurrogateLoss
    average: Average
    penalty: Penalty | None = None
    correction: Correction | None = None

    def __call__(self, logp: Tensor, given: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss as a sum to be divided by the step's ``average.count``, and sums over tokens to be logged.

        Args:
            logp: log-probability of each token under the policy [B,T], with its gradient
            given: what was sampled
        """
        mask = given.mask
        logp = torch.where(mask > 0, logp, given.old)  # padding may have any value, also one that is not finite
        surrogate = self.surrogate(logp, given.old, given.advantage, mask)
        loss, sums = surrogate.loss, {}
        if self.correction is not None:
            assert given.sampler is not None
            factor = self.correction(logp, given.old, given.sampler, given.advantage, mask)
            loss, sums["correction"] = loss * factor, (factor * mask).sum()
        if self.penalty is not None:
            assert given.reference is not None
            kl = self.penalty(logp, given.reference, given.old)
            loss, sums["kl"] = loss + self.penalty.beta * kl, (kl.detach() * mask).sum()
        sums |= {"clip_low": (surrogate.low * mask).sum(), "clip_high": (surrogate.high * mask).sum()}
        return (loss * self.average.weights(mask)).sum(), sums
