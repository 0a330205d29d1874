from __future__ import annotations

from blocks.position.base import Position
from registry import register


@register("position", "none")
class NoPosition(Position):
    """No position signal at all: order is left to the causal mask.

    Kazemnejad et al. 2023 (NoPE), arXiv 2305.19466.
    """
