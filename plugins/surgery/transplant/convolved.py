from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.convolution import Canon
from blockwright.blocks.residual.base import Residual
from blockwright.blocks.residual.convolved import Convolved
from blockwright.plugins.surgery.settings import differences
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.plugins.surgery.transplant.canon import convolutions
from blockwright.registry import register

INNER = "residual."


@register("transplant", "convolved")
class AroundMixers(Transplant):
    """A residual block → ``convolved`` around it, whose Canon layers begin at zero: u + 0, which is exact."""

    handles: ClassVar[tuple[str, ...]] = (
        *("name", "residual", "streams", "starts", "eps", "closing", "mixing"),
        *("attention_conv", "attention_out_conv", "ffn_conv", "ffn_out_conv"),
        *("attention_norm", "attention_out_norm", "ffn_norm", "ffn_out_norm"),
        *("attention_stream_norm", "ffn_stream_norm", "attention_connection", "ffn_connection"),
        *("attention_query", "ffn_query", "closing_query"),
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"residual": {"name": "convolved", "residual": {"name": "prenorm"}, "ffn_conv": {"name": "canon"}}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        if not isinstance(old, Residual) or not isinstance(new, Convolved) or isinstance(old, Convolved):
            return False
        begun = all(isinstance(block, Canon) for block in convolutions(new).values())
        return begun and shapes(old) == shapes(new.residual) and not differences(old, new.residual)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = {INNER + name: tensor for name, tensor in old.state_dict().items()}
        begun = {name: torch.zeros_like(t) for name, t in new.state_dict().items() if name not in copied}
        return Transplanted({**copied, **begun}, frozenset(copied), exact=True, note="convolutions begin at zero")
