from __future__ import annotations

from torch import Tensor

from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.scores.base import Scores
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("scores", "softcap")
class Softcap(Scores):
    """Scores bounded to ±cap before the softmax.

    Bello et al. 2016, arXiv 1611.09940; Gemma-2, arXiv 2408.00118: softmax(cap · tanh(q·k scale / cap)). A position's
    bias is added after the cap, and masked keys are masked after it. No fused kernel of torch computes it, so the
    scores of all T × S pairs are materialised.

    Args:
        cap: bound of the scores; 50 in Gemma-2
    """

    def __init__(self, cap: Positive = 50.0) -> None:
        super().__init__()
        self.cap = cap

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        return self.kernels.attend(q, k, v, scoring._replace(softcap=self.cap))
