from __future__ import annotations

import copy

import torch
from torch import nn

from blocks.attention.grouped import GroupedAttention
from blocks.cost import signature
from blocks.transplant.base import Setting, Transplant, Transplanted
from blocks.values.value_residual import ValueResidual
from registry import register

FACTORS = "values.factors"


@register("transplant", "first_values")
class FirstValues(Transplant):
    """An attention → the same with ``values: value_residual``: λ₁ begins at 1, λ₂ at 0, which is exact."""

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, GroupedAttention) or not isinstance(new, GroupedAttention) or old.values is not None:
            return False
        bare = copy.copy(new)
        bare._modules = {name: module for name, module in new._modules.items() if name != "values"}
        bare.values = None
        return isinstance(new.values, ValueResidual) and signature(bare) == signature(old)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {FACTORS: torch.tensor((1.0, 0.0))}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="values begin as they were")
