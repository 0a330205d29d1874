from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.memory.base import Memory
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted
from blockwright.registry import register


@register("transplant", "silent_memory")
class SilentMemory(Transplant):
    """A layer without a memory → one with a memory that adds nothing yet: exact, if the memory says how (``silent``).

    All else of it is drawn, so that it learns from the first step.
    """

    fills: ClassVar[bool] = True
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {"memory": {"name": "engram", "rows": 37, "n_heads": 2}},
    )

    def serves(self, old: nn.Module | None, new: nn.Module) -> bool:
        return old is None and isinstance(new, Memory)

    def __call__(self, old: nn.Module | None, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(new, Memory)
        begun = new.state_dict()
        silent = {name: torch.zeros_like(begun[name]) for name in new.silent if name in begun}
        drawn = sum(p.numel() for name, p in new.named_parameters() if name not in silent)
        note = f"{', '.join(silent)} begins at 0" if silent else "nothing of it can begin at 0"
        return Transplanted({**begun, **silent}, frozenset(), bool(silent), note, drawn)
