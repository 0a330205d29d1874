from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, shapes
from blockwright.registry import register


@register("transplant", "window")
class Window(Transplant):
    """Full attention → attention within a window, or the reverse: the weights are copied.

    Exact if no sequence is longer than either window. Beltagy et al. 2020 (Longformer), arXiv 2004.05150, do the
    reverse of it to extend a context.
    """

    handles: ClassVar[tuple[str, ...]] = ("window",)
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"attention": {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 64}},
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        grouped = isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)
        return grouped and old.window != new.window and shapes(old) == shapes(new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, GroupedAttention)
        tensors = old.state_dict()
        windows = [attention.window for attention in (old, new) if attention.window is not None]
        exact = min(windows, default=setting.max_positions) >= setting.max_positions
        return Transplanted(tensors, frozenset(tensors), exact, f"exact up to {min(windows)} tokens")
