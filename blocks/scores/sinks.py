from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Placement
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.scores.base import Scores
from blockwright.registry import register


@register("scores", "sinks")
class Sinks(Scores):
    """A learned score per head that competes with all keys and has no value, so a head may attend to nothing.

    gpt-oss, arXiv 2508.10925; Xiao et al. 2023, arXiv 2309.17453, with a number in place of a token:
    w_j = exp(s_j) / (exp(sink_n) + Σ_i exp(s_i)). Computed as one more key of zeros, with value zero and the sink as
    its score. Sinks start at 0.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(n_heads))

    def reset_parameters(self) -> None:
        self.sinks.zero_()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        return self.kernels.attend(q, k, v, scoring._replace(sinks=self.sinks))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"sinks": "column"}
