from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.cache.state import State
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import register


@register("attention", "none")
class NoAttention(Recurrent):
    """No mixing of tokens: y = 0, for layers that have a feed-forward block alone.

    Nemotron-H, arXiv 2504.03624, alternates layers of one block each. With ``residual: {name: prenorm, attention_norm:
    none}`` the layer has no norm for it either.
    """

    empty: ClassVar[bool] = True
    residual_outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        return x * 0, {}  # not zeros: the norm before it must have a gradient, or data parallelism stops
