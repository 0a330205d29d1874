from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.residual.norms import PreNorm, SigmoidSkip
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.registry import register


@register("transplant", "sigmoid_skip")
class ToSigmoidSkip(Transplant):
    """``prenorm`` → ``sigmoid_skip``, whose gate begins at 1: the norms are copied. Exact."""

    handles: ClassVar[tuple[str, ...]] = ("name", "weight", "bias")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = ({}, {"residual": {"name": "sigmoid_skip"}})

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if type(old) is not PreNorm or not isinstance(new, SigmoidSkip):
            return False
        return shapes(old).items() <= shapes(new).items()

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        return Transplanted({**new.state_dict(), **copied}, frozenset(copied), exact=True, note="gates begin at 1")
