from __future__ import annotations

from torch import Tensor

from blockwright.blocks.norm.base import Norm
from blockwright.registry import register


@register("norm", "none")
class NoNorm(Norm):
    """No normalisation: y = x.

    Transformers train without some of them: He & Hofmann 2024, arXiv 2311.01906. As ``kv_norm`` of ``mla`` it keeps
    keys and values linear in x, as those of an attention that is turned into a latent one are.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
