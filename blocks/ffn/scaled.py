from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Placement
from blockwright.blocks.drawn import Drawn
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.registry import register


@register("ffn", "scaled")
class Scaled(FFN):
    """Another feed-forward block, whose output a learned number multiplies: y = g · ffn(x).

    Inkling (Thinking Machines 2026), in its dense layers. g starts at 1.

    Args:
        ffn: the other block; ``swiglu`` if none is named
    """

    default_children: ClassVar[Mapping[str, Any]] = {"ffn": {"name": "swiglu"}}

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn = ffn
        self.gain = nn.Parameter(torch.empty(1))

    def drawn(self) -> Drawn:
        return Drawn(("a learned factor",))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        y, routing = self.ffn(x, given)
        return y * self.gain, routing

    def parallel_plan(self) -> dict[str, Placement]:
        return {"gain": "replicate"}
