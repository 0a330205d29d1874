"""Losses of pairs of answers, of which one is preferred: DPO and its relatives, and the loss of reward models.

For P pairs, r(answer) is the reward that a policy π implies, and Δr = r(chosen) − r(rejected) its margin [P]:

| loss | of a pair | r(answer) |
|---|---|---|
| sigmoid (DPO) | −log σ(Δr) | β log π/π_ref |
| sigmoid_norm | −log σ(Δr) | β log π/π_ref / tokens |
| robust | (−(1 − ε) log σ(Δr) + ε log σ(−Δr)) / (1 − 2 ε) | β log π/π_ref |
| hinge | max(0, 1 − Δr) | β log π/π_ref |
| ipo | (Δr/β − 1/(2β))² | β log π/π_ref / tokens |
| apo_zero | 1 − σ(r(chosen)) + σ(r(rejected)) | β log π/π_ref |
| simpo | −log σ(Δr − γ) | β log π / tokens |
| orpo | −log p(chosen) − β log σ(log odds(chosen) − log odds(rejected)) | β log π / tokens |
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from blockwright.registry import Composable, family, register
from blockwright.registry.ranges import NonNegative, Positive

Smoothing = Annotated[float, Ge(0), Lt(0.5)]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of one answer of each of P pairs.

    Args:
        logp: under the policy, summed over the scored tokens [P], with its gradient
        tokens: number of scored tokens [P]
        reference: under the reference policy [P]; None for losses that do not compare with one
    """

    logp: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Log-probability a token [P]."""
        return self.logp / self.tokens

    @property
    def ratio(self) -> Tensor:
        """log π/π_ref [P]."""
        assert self.reference is not None
        return self.logp - self.reference


@family("preference", root="task")
class PreferenceLoss(Composable):
    """The loss of each pair, and the reward of an answer that the policy implies.

    Args:
        beta: factor on log-ratios: small for a policy that may move far from the reference

    Class attributes:
        compares: the loss needs log-probabilities under a reference policy
    """

    compares: ClassVar[bool] = True

    def __init__(self, beta: Positive = 0.1) -> None:
        self.beta = beta

    @abstractmethod
    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        """The loss of each pair [P]."""

    def reward(self, answers: Answers) -> Tensor:
        """The implied reward of each answer [P], which is logged."""
        return self.beta * answers.ratio

    def margin(self, chosen: Answers, rejected: Answers) -> Tensor:
        """The implied reward of the chosen answer less that of the rejected one [P]."""
        return self.reward(chosen) - self.reward(rejected)


# --- against a reference ----------------------------------------------------------------------------------------------


@register("preference", "sigmoid")
class Sigmoid(PreferenceLoss):
    """Direct preference optimisation.

    Rafailov et al. 2023 (DPO), arXiv 2305.18290: −log σ(β Δ), Δ = log π(chosen)/π_ref(chosen) − log
    π(rejected)/π_ref(rejected), over whole answers. With label smoothing ε it is the conservative loss of the same
    authors (cDPO): −(1 − ε) log σ(β Δ) − ε log σ(−β Δ).

    Args:
        beta: factor on log-ratios
        label_smoothing: ε, the assumed share of pairs whose preference is wrong
    """

    def __init__(self, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(beta)
        self.label_smoothing = label_smoothing

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        share, margin = self.label_smoothing, self.margin(chosen, rejected)
        return -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)


@register("preference", "sigmoid_norm")
class SigmoidNorm(Sigmoid):
    """DPO with log-ratios a token: longer answers do not weigh more.

    Lambert et al. 2024 (Tülu 3), arXiv 2411.15124: −log σ(β (log-ratio of chosen / its tokens − that of rejected / its
    tokens)). The paper has β = 5.
    """

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.ratio / answers.tokens


@register("preference", "robust")
class Robust(PreferenceLoss):
    """DPO's loss without the bias that wrong preferences bring.

    Chowdhury et al. 2024 (rDPO), arXiv 2403.00409: (−(1 − ε) log σ(β Δ) + ε log σ(−β Δ)) / (1 − 2 ε), whose expectation
    over labels flipped with probability ε is the loss of true ones.

    Args:
        beta: factor on log-ratios
        label_smoothing: ε, the assumed share of pairs whose preference is wrong
    """

    def __init__(self, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> None:
        super().__init__(beta)
        self.label_smoothing = label_smoothing

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        share, margin = self.label_smoothing, self.margin(chosen, rejected)
        return (-(1 - share) * F.logsigmoid(margin) + share * F.logsigmoid(-margin)) / (1 - 2 * share)


@register("preference", "hinge")
class Hinge(PreferenceLoss):
    """max(0, 1 − β Δ) of DPO's Δ.

    Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, in DPO's form, as TRL has it: pairs that are separated by 1/β nats
    teach nothing.
    """

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return (1 - self.margin(chosen, rejected)).clamp(min=0)


@register("preference", "ipo")
class IPO(PreferenceLoss):
    """Identity preference optimisation: the difference of log-ratios is drawn to a target, not to infinity.

    Azar et al. 2023, arXiv 2310.12036, eq. 17: (Δ − 1/(2β))², with β for the paper's τ. Log-ratios are means over
    tokens, as the authors corrected and TRL does; the paper has sums.
    """

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        difference = self.margin(chosen, rejected) / self.beta
        return (difference - 1 / (2 * self.beta)).square()

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.ratio / answers.tokens


@register("preference", "apo_zero")
class APOZero(PreferenceLoss):
    """Raises the chosen answer and lowers the rejected one, each against the reference.

    D'Oosterlinck et al. 2024, arXiv 2408.06266: 1 − σ(β log-ratio of chosen) + σ(β log-ratio of rejected). DPO's loss
    may lower both; use this where the chosen answers are better than those of the model.
    """

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return 1 - self.reward(chosen).sigmoid() + self.reward(rejected).sigmoid()


# --- without a reference ----------------------------------------------------------------------------------------------


@register("preference", "simpo")
class SimPO(PreferenceLoss):
    """Preference without a reference, by log-probabilities a token.

    Meng et al. 2024, arXiv 2405.14734: −log σ(β (mean log π(chosen) − mean log π(rejected)) − γ). The paper has β from
    2 to 10 and γ/β from 0.3 to 1.6.

    Args:
        beta: factor on mean log-probabilities
        gamma: the margin wanted
    """

    compares: ClassVar[bool] = False

    def __init__(self, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> None:
        super().__init__(beta)
        self.gamma = gamma

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -F.logsigmoid(self.margin(chosen, rejected) - self.gamma)

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean


@register("preference", "orpo")
class ORPO(PreferenceLoss):
    """Fine-tuning on the chosen answer, and preference by the ratio of odds, in one stage without a reference.

    Hong et al. 2024, arXiv 2403.07691: −log p(chosen) − β log σ(log odds(chosen) − log odds(rejected)), where p is the
    geometric mean over an answer's tokens and odds = p / (1 − p); β is the paper's λ. The first term is that of each
    answer; TRL averages it over the tokens of a batch.
    """

    compares: ClassVar[bool] = False

    def __call__(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -chosen.mean - self.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean


def _log_odds(answers: Answers) -> Tensor:
    """log p − log(1 − p) [P]; an answer of probability 1 in fp32 has those of 1 − 1e-7."""
    mean = answers.mean.clamp(max=-1e-7)
    return mean - torch.log(-torch.expm1(mean))


# --- of scores, for reward models -------------------------------------------------------------------------------------


def bradley_terry(chosen: Tensor, rejected: Tensor, centre: float = 0.0) -> Tensor:
    """−log σ(chosen − rejected) + centre · (chosen + rejected)², of scores [P]; [P].

    Bradley and Terry 1952; Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, eq. 1. The second term (Eisenstein et
    al. 2023, arXiv 2312.09244) keeps scores around 0, which the first leaves open.
    """
    return -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected).square()
