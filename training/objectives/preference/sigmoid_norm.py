from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.preference.base import Answers
from blockwright.training.objectives.preference.sigmoid import Sigmoid


@register("preference", "sigmoid_norm")
class SigmoidNorm(Sigmoid):
    """DPO with log-ratios a token: longer answers do not weigh more.

    Lambert et al. 2024 (Tülu 3), arXiv 2411.15124: −log σ(β (log-ratio of chosen / its tokens − that of rejected / its
    tokens)). The paper has β = 5.
    """

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.ratio / answers.tokens
