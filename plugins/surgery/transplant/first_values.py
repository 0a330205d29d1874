from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.values import ValueResidual
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes, unhandled
from blockwright.registry import register

FACTORS = "values.factors"


@register("transplant", "first_values")
class FirstValues(Transplant):
    """An attention → the same with ``values: value_residual``: λ₁ begins at 1, λ₂ at 0, which is exact."""

    handles: ClassVar[tuple[str, ...]] = ("values",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"values": {"name": "value_residual"}})

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, GroupedAttention) or not isinstance(new, GroupedAttention) or old.values is not None:
            return False
        here = {name: shape for name, shape in shapes(new).items() if name != FACTORS}
        return isinstance(new.values, ValueResidual) and here == shapes(old) and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {FACTORS: torch.tensor((1.0, 0.0), dtype=torch.float32)}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="values begin as they were")
