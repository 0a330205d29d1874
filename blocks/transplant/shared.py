from __future__ import annotations

import torch
from torch import nn

from blocks.ffn.moe import MoE
from blocks.ffn.swiglu import SwiGLU
from blocks.transplant.base import Setting, Transplanted, shapes
from blocks.transplant.upcycle import Upcycle
from registry import register


@register("transplant", "shared")
class Shared(Upcycle):
    """The dense block becomes the shared expert; routed experts are drawn, and their outputs begin at zero.

    Exact with any gate: y = dense(x) + 0. Only the routed outputs have a gradient at the first step, as the B of
    low-rank adapters.
    """

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        return isinstance(new.shared, SwiGLU) and shapes(new.shared) == shapes(old)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = {f"shared.{name}": tensor for name, tensor in old.state_dict().items()}
        zero = {"experts.down": torch.zeros_like(new.state_dict()["experts.down"])}
        return Transplanted({**copied, **zero}, frozenset(copied), exact=True, note="routed outputs begin at zero")
