from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.scores.base import Scores
from blockwright.registry import register


@register("scores", "talking_heads")
class TalkingHeads(Scores):
    """Heads that hear each other's scores, and each other's weights.

    Shazeer et al. 2020, arXiv 2003.02436: w = P_w softmax(P_l (q·k scale)), with P_l and P_w [N,N] over the heads; a
    position's bias and the mask come between P_l and the softmax. Both start as the identity, so as a plain softmax.
    No fused kernel computes it, so the scores of all T × S pairs are materialised.
    """

    # They begin as the identity: decay would silence the heads.
    weight_kinds: ClassVar[Mapping[str, Kind]] = {"of_scores": "vector", "of_weights": "vector"}
    per_head = False

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.of_scores, self.of_weights = (nn.Parameter(torch.empty(n_heads, n_heads)) for _ in range(2))

    def reset_parameters(self) -> None:
        nn.init.eye_(self.of_scores)
        nn.init.eye_(self.of_weights)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        scores = torch.einsum("mn,btnh,bsnh->bmts", self.of_scores, q, k) * scoring.scale
        bias = dense(scoring.bias)
        scores = scores if bias is None else scores + bias
        seen = visible(q.shape[1], k.shape[1], q.device, scoring.segments, scoring.window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(
            -1, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        return torch.einsum("mn,bnts,bsmv->btmv", self.of_weights, weights.to(v.dtype), v)

    def neutral(self) -> dict[str, Tensor]:
        heads = torch.eye(len(self.of_scores), dtype=torch.float32)
        return {"of_scores": heads, "of_weights": heads.clone()}

    def parallel_plan(self) -> dict[str, Placement]:
        return {"of_scores": "replicate", "of_weights": "replicate"}
