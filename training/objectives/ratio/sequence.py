from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.ratio.base import Ratio


@register("ratio", "sequence")
class Sequence(Ratio):
    """One ratio a completion, the geometric mean of those of its tokens.

    Zheng et al. 2025 (GSPO), arXiv 2507.18071: s = (π(o) / π_old(o))^(1/|o|) = exp(mean_t log ρ_t), for every token of
    the completion. Such ratios vary far less than those of tokens, so clip ranges are about 1000 times smaller. The
    outputs of DeepSeek-V2's equations 32 to 34 also have one ratio each, but not its |o|-th root.
    """

    def __init__(self) -> None: ...

    def __call__(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        mean = ((logp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return mean.expand_as(logp)
