from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.carry import Carry
from blockwright.blocks.norm.base import Norm
from blockwright.blocks.values.base import Values
from blockwright.registry import register


@register("values", "normed")
class Normed(Values):
    """Each head's values are normalised: v_g ← norm(v_g), over the H numbers of a head.

    Gemma 4, without a gain: ``norm: unit_rms``.

    Args:
        norm: of each head
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["head_dim"]}

    def forward(self, v: Tensor, carry: Carry | None) -> Tensor:
        normed: Tensor = self.norm(v)
        return normed
