from __future__ import annotations

from torch import Tensor

from blockwright.registry import register
from blockwright.training.objectives.ratio.base import Ratio


@register("ratio", "token")
class Token(Ratio):
    """One ratio a token: ρ_t = π(o_t) / π_old(o_t), as in PPO and GRPO, arXiv 2402.03300."""

    def __init__(self) -> None: ...

    def __call__(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        return logp - old
