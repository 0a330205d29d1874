"""The loss of policy optimisation. Each of its parts is a registered kind, chosen by ``task/<kind>=<name>``.

A policy π_old has sampled completions i with tokens t and advantages A_i (advantages.py). The loss of the policy π is

    1/count · Σ_i Σ_t weight_it · (correction_it · surrogate(ρ_it, A_i) + β · penalty_it),    ρ = π / π_old

where the average gives weight and count. Published choices are named by ``task/objective``, with their numbers in
plugins/alignment/conf/task/objective:

| objective | advantage | ratio | surrogate | average | penalty | correction |
|---|---|---|---|---|---|---|
| grpo | group | token | clip | sequence | | |
| dr_grpo | centred | token | clip | constant | | |
| dapo | group | token | clip | token | | |
| gspo | group | sequence | clip | sequence | | |
| cispo | group | token | cispo | token | | |
| deepseek_v2 | group | token | clip | sequence | k3 | |
| deepseek_v3_2 | centred | token | clip | sequence | weighted_k3 | off_policy |

So GRPO is 1/rows Σ_i 1/|o_i| Σ_t −min(ρ A, clip(ρ, 0.8, 1.2) A) with A = (r − mean r) / std r over the group.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, Composable, family, register
from blockwright.registry.ranges import Positive, ProperFraction


@dataclass(frozen=True)
class Completions:
    """B completions of at most T tokens, without gradient. Arguments of all parts have these names.

    Args:
        old: log-probability of each token under π_old, as the trainer computes it [B,T]
        advantage: of each completion [B]
        mask: 1 for tokens that are scored, else 0 [B,T]
        sampler: log-probability of each token under π_old, as the sampler computed it [B,T]; for a correction
        reference: log-probability of each token under the reference policy [B,T]; for a penalty
    """

    old: Tensor
    advantage: Tensor
    mask: Tensor
    sampler: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyObjective:
    """The loss of a policy on completions.

    Args:
        surrogate: the loss of a token, whose gradient follows the advantage
        average: of the tokens' losses
        penalty: on the distance from a reference policy, if any
        correction: weights against the difference of sampler and trainer, if any
    """

    surrogate: SurrogateLoss
    average: Average
    penalty: Penalty | None = None
    correction: Correction | None = None

    def __call__(self, logp: Tensor, sampled: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss as a sum, to be divided by the step's ``average.count``; and sums over tokens, to be logged.

        Args:
            logp: log-probability of each token under π [B,T], with its gradient
            sampled: the completions
        """
        old, advantage, mask = sampled.old, sampled.advantage, sampled.mask
        logp = torch.where(mask > 0, logp, old)  # padding may have any value, also one that is not finite
        loss, low, high = self.surrogate(logp, old, advantage, mask)
        figures = {}
        if self.correction is not None:
            assert sampled.sampler is not None
            figures["correction"] = factor = self.correction(logp, old, sampled.sampler, advantage, mask)
            loss = loss * factor
        if self.penalty is not None:
            assert sampled.reference is not None
            kl = self.penalty(logp, sampled.reference, old)
            figures["kl"] = kl.detach()
            loss = loss + self.penalty.beta * kl
        figures |= {"clip_low": low, "clip_high": high}
        sums = {name: (figure * mask).sum() for name, figure in figures.items()}
        return (loss * self.average.weights(mask)).sum(), sums


# --- ratio: how much likelier a token is under π than under π_old -----------------------------------------------------


@family("ratio", root="task")
class Ratio(Composable):
    """The log-ratio log ρ of the policy to the policy that sampled."""

    def __init__(self) -> None: ...

    @abstractmethod
    def __call__(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        """log ρ of each token [B,T], with the gradient of ``logp``."""


@register("ratio", "token")
class TokenRatio(Ratio):
    """One ratio a token: ρ_t = π(o_t) / π_old(o_t), as in PPO and GRPO, arXiv 2402.03300."""

    def __call__(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        return logp - old


@register("ratio", "sequence")
class SequenceRatio(Ratio):
    """One ratio a completion, the geometric mean of those of its tokens.

    Zheng et al. 2025 (GSPO), arXiv 2507.18071: s = (π(o) / π_old(o))^(1/|o|) = exp(mean_t log ρ_t), for every token of
    the completion. Such ratios vary far less than those of tokens, so clip ranges are about 1000 times smaller. The
    outputs of DeepSeek-V2's equations 32 to 34 also have one ratio each, but not its |o|-th root.
    """

    def __call__(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        mean = ((logp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return mean.expand_as(logp)


# --- surrogate: the loss of a token, whose gradient follows the advantage ---------------------------------------------


class Surrogate(NamedTuple):
    """The result of a surrogate.

    loss: of each token [B,T], with its gradient
    low: tokens that are clipped because their ratio is too low, bool [B,T]
    high: tokens that are clipped because their ratio is too high, bool [B,T]
    """

    loss: Tensor
    low: Tensor
    high: Tensor


@family("surrogate", root="task")
class SurrogateLoss(Composable):
    """The loss of each token of a completion."""

    @abstractmethod
    def __call__(self, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        """Losses, and tokens that are clipped; values where ``mask`` is 0 have no meaning."""


@register("surrogate", "clip")
class Clip(SurrogateLoss):
    """PPO's clipped objective: −min(ρ A, clip(ρ, 1 − low, 1 + high) A).

    Schulman et al. 2017, arXiv 1707.06347; GRPO, arXiv 2402.03300. DAPO's higher upper bound (arXiv 2503.14476) is
    ``high``. A ``ceiling`` above 1 + high bounds ρ before all else. It matters only where A < 0, where the minimum has
    no other bound: both the dual clipping of Ye et al. 2019 (arXiv 1912.09729, verl's ``clip_ratio_c``) and the
    two-sided clipping of INTELLECT-2 (arXiv 2505.07291, TRL's ``delta``).

    Args:
        ratio: of tokens, or of completions (GSPO)
        low: how far below 1 a ratio still matters
        high: how far above 1 a ratio still matters
        ceiling: largest ratio where the advantage is negative; null for none
    """

    def __init__(
        self, ratio: Ratio, low: ProperFraction = 0.2, high: Positive = 0.2, ceiling: Positive | None = None
    ) -> None:
        if ceiling is not None and ceiling <= 1 + high:
            rule = f"must be above 1 + high ({1 + high:g})"
            raise BlockError("ceiling", ceiling, rule, "Raise it, or write null for none")
        self.ratio, self.low, self.high, self.ceiling = ratio, low, high, ceiling

    def __call__(self, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        ratio, gain = self.ratio(logp, old, mask).exp(), advantage[:, None]
        low, high = 1 - self.low, 1 + self.high
        bounded = ratio if self.ceiling is None else ratio.clamp(max=self.ceiling)
        loss = -torch.min(bounded * gain, ratio.clamp(low, high) * gain)
        return Surrogate(loss, (ratio < low) & (gain < 0), (ratio > high) & (gain > 0))


@register("surrogate", "cispo")
class CISPO(SurrogateLoss):
    """Clipped weights instead of clipped updates: −sg(min(ρ, 1 + high)) A log π, sg without gradient.

    MiniMax 2025 (MiniMax-M1), arXiv 2506.13585. Every token keeps a gradient, also those far from the sampling policy.
    As in the paper's experiments there is no lower bound, and the upper is 1 + high, where TRL's ``epsilon_high`` is
    the bound itself.

    Args:
        ratio: of tokens, or of completions
        high: how far above 1 a weight may be
    """

    def __init__(self, ratio: Ratio, high: Positive = 4.0) -> None:
        self.ratio, self.high = ratio, high

    def __call__(self, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        ratio, gain = self.ratio(logp, old, mask).detach().exp(), advantage[:, None]
        high = 1 + self.high
        loss = -ratio.clamp(max=high) * gain * logp
        return Surrogate(loss, torch.zeros_like(ratio, dtype=torch.bool), (ratio > high) & (gain > 0))


# --- average: from the losses of tokens to the loss of an optimizer step ----------------------------------------------


@family("average", root="task", context=("max_new_tokens",))
class Average(Composable):
    """Weights of tokens, and the number that their weighted sum is divided by.

    The number is summed over all micro-batches and ranks of the optimizer step before the division, so accumulation and
    data parallelism do not change the loss. Token means of each micro-batch, as in TRL's ``bnpo``, would.
    """

    def __init__(self) -> None: ...

    @abstractmethod
    def weights(self, mask: Tensor) -> Tensor:
        """The weight of each token [B,T], 0 where the mask [B,T] is."""

    @abstractmethod
    def count(self, mask: Tensor) -> Tensor:
        """The part of these completions in the number to divide by, a scalar integer."""


@register("average", "token")
class TokenAverage(Average):
    """The mean over all tokens of the step.

    Yu et al. 2025 (DAPO), arXiv 2503.14476: Σ_i Σ_t loss / Σ_i |o_i|. Long completions weigh more than short ones.
    """

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()

    def count(self, mask: Tensor) -> Tensor:
        return mask.sum().long()


@register("average", "sequence")
class SequenceAverage(Average):
    """The mean over completions of the means over their tokens.

    Shao et al. 2024 (GRPO), arXiv 2402.03300: 1/rows Σ_i 1/|o_i| Σ_t loss. A token of a long completion weighs less. A
    completion without scored tokens counts as a row, as in TRL.
    """

    def weights(self, mask: Tensor) -> Tensor:
        return at_least_fp32(mask) / mask.sum(1, keepdim=True).clamp(min=1)

    def count(self, mask: Tensor) -> Tensor:
        return mask.new_tensor(len(mask), dtype=torch.int64)


@register("average", "constant")
class ConstantAverage(Average):
    """The sum over tokens, divided by the rows times the longest completion allowed.

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783: Σ_i Σ_t loss / (rows · max_new_tokens). A token's weight depends
    neither on the length of its completion nor on those of others.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()

    def count(self, mask: Tensor) -> Tensor:
        return mask.new_tensor(len(mask) * self.max_new_tokens, dtype=torch.int64)


# --- penalty: the cost of a departure from the reference policy -------------------------------------------------------


@family("penalty", root="task")
class Penalty(Composable):
    """Adds ``beta`` times an estimate of KL(π ‖ reference) to the loss of each token.

    Args:
        beta: weight of the estimate
    """

    def __init__(self, beta: Positive = 0.04) -> None:
        self.beta = beta

    @abstractmethod
    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        """The estimate for each token [B,T], without ``beta``."""


@register("penalty", "k1")
class K1(Penalty):
    """log π − log reference: unbiased as a value, but on policy its expected gradient is 0, so it holds nothing back.

    Schulman 2020, "Approximating KL divergence". Useful as a figure and for comparison.
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return logp - reference


@register("penalty", "k2")
class K2(Penalty):
    """½ (log π − log reference)²: biased as a value; on policy its expected gradient is that of KL(π ‖ reference).

    Schulman 2020, "Approximating KL divergence".
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return (logp - reference).square() / 2


@register("penalty", "k3")
class K3(Penalty):
    """π_ref/π − log(π_ref/π) − 1, the estimate of GRPO and DeepSeek-V2 (arXiv 2405.04434, eq. 33).

    Schulman 2020. Unbiased as a value and never negative. As a loss its expected gradient on policy is that of
    KL(reference ‖ π).
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        difference = reference - logp
        return difference.exp() - difference - 1


@register("penalty", "weighted_k3")
class WeightedK3(K3):
    """k3 times the ratio π/π_old, with the ratio's gradient: DeepSeek-V3.2's unbiased estimate.

    DeepSeek-AI 2025, arXiv 2512.02556, §3.1: the expected gradient is that of KL(π ‖ reference) also off policy, and
    stays bounded for tokens that the policy finds far less likely than the reference does.
    """

    def __call__(self, logp: Tensor, reference: Tensor, old: Tensor) -> Tensor:
        return (logp - old).exp() * super().__call__(logp, reference, old)


# --- correction: weights against the difference between sampler and trainer -------------------------------------------

Level = Literal["token", "sequence"]


@family("correction", root="task")
class Correction(Composable):
    """Factors on the surrogate loss of each token, without gradient; a penalty is not weighted."""

    @abstractmethod
    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """Factors [B,T]."""


@register("correction", "truncate")
class Truncate(Correction):
    """Truncated importance sampling: min(π_old/sampler, cap).

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        level: ``token``; or ``sequence`` for the product over the completion
        cap: largest factor
    """

    def __init__(self, level: Level = "token", cap: Positive = 2.0) -> None:
        self.level, self.cap = level, cap

    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return importance(old, sampler, mask, self.level).clamp(max=self.cap)


@register("correction", "mask")
class Mask(Correction):
    """Importance sampling that drops what is too far off: π_old/sampler, or 0 above ``cap``.

    TRL's default for vLLM (``sequence_mask``, cap 3).

    Args:
        level: ``token``; or ``sequence`` for the product over the completion
        cap: largest factor
    """

    def __init__(self, level: Level = "sequence", cap: Positive = 3.0) -> None:
        self.level, self.cap = level, cap

    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        factor = importance(old, sampler, mask, self.level)
        return factor.masked_fill(factor > self.cap, 0.0)


@register("correction", "off_policy")
class OffPolicy(Correction):
    """Drops a completion with a negative advantage that the policy has moved far away from.

    DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv 2512.02556, §3.1: factor 0 where A < 0 and mean_t log(sampler/π) > delta,
    else 1. The paper does not give delta; 0.5 is TRL's suggestion.

    Args:
        delta: mean log-ratio, in nats per token, above which it is dropped
    """

    def __init__(self, delta: Positive = 0.5) -> None:
        self.delta = delta

    def __call__(self, logp: Tensor, old: Tensor, sampler: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        mean = ((sampler - logp.detach()) * mask).sum(1) / mask.sum(1).clamp(min=1)
        kept = ~((advantage < 0) & (mean > self.delta))
        return kept[:, None].to(logp.dtype).expand_as(logp)


def importance(old: Tensor, sampler: Tensor, mask: Tensor, level: Level) -> Tensor:
    """π_old / sampler of each token, or of its whole completion, the product over its tokens; [B,T]."""
    log = (old - sampler) * mask
    return (log if level == "token" else log.sum(1, keepdim=True).expand_as(log)).exp()
