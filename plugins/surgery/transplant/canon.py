from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.convolution import Canon, Convolution
from blockwright.blocks.ffn import FFN
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes, unhandled
from blockwright.registry import register


@register("transplant", "canon")
class CanonLayers(Transplant):
    """An attention or a feed-forward block → the same with Canon layers, which begin at zero: u + 0, which is exact."""

    handles: ClassVar[tuple[str, ...]] = (
        *("query_conv", "key_conv", "value_conv", "latent_conv", "gate_conv", "up_conv"),
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {
                "name": "swiglu",
                "d_ff": 48,
                "gate_conv": {"name": "canon"},
                "up_conv": {"name": "canon", "taps": 3},
            }
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(new, Attention | FFN) or type(old) is not type(new):
            return False
        added, before = (convolutions(block) for block in (new, old))
        begun = all(isinstance(block, Canon) for name, block in added.items() if name not in before)
        kept = all(shapes(block) == shapes(added[name]) for name, block in before.items() if name in added)
        grown = begun and kept and before.keys() < added.keys()
        return grown and without(added, new) == without(before, old) and not unhandled(self, old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = old.state_dict()
        begun = {name: torch.zeros_like(t) for name, t in new.state_dict().items() if name not in copied}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="convolutions begin at zero")


def convolutions(block: nn.Module) -> dict[str, Convolution]:
    """Name → each convolution in a block."""
    return {name: part for name, part in block.named_modules() if isinstance(part, Convolution)}


def without(parts: Mapping[str, nn.Module], block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything in a block's state, but for that of some parts."""
    return {name: shape for name, shape in shapes(block).items() if name.rpartition(".")[0] not in parts}
