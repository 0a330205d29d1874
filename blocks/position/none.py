from __future__ import annotations

from blockwright.blocks.position.base import Position
from blockwright.registry import register


@register("position", "none")
class NoPosition(Position):
    """No position signal: order is visible only through the causal mask.

    Kazemnejad et al. 2023 (NoPE), arXiv 2305.19466.
    """
