from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.ffn import MoE, SwiGLU
from blockwright.plugins.surgery.transplant.base import Setting, Transplanted, shapes
from blockwright.plugins.surgery.transplant.upcycle import Upcycle, is_plain
from blockwright.registry import register


@register("transplant", "shared")
class Shared(Upcycle):
    """The dense block becomes the shared expert; routed experts are drawn, and their outputs begin at zero.

    Exact with any gate: y = dense(x) + 0. Only the routed outputs have a gradient at the first step, as the B of
    low-rank adapters.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 48}},
            "experts": {"name": "swiglu", "d_ff": 16},
            "gating": {"name": "topk_softmax", "top_k": 2},
        },
    )

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        return is_plain(new.shared, SwiGLU) and shapes(new.shared) == shapes(old)  # type: ignore[arg-type]

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = {f"shared.{name}": tensor for name, tensor in old.state_dict().items()}
        zero = {"experts.down": torch.zeros_like(new.state_dict()["experts.down"])}
        return Transplanted({**copied, **zero}, frozenset(copied), exact=True, note="routed outputs begin at zero")
