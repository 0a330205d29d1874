"""The contract of ``residual``: how a layer's mixers and norms are connected to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from blocks.base import Block
from registry import family

Mixer = Callable[[Tensor], Tensor]


@family("residual")
class Residual(Block):
    """Owns the layer's norms (children of kind ``norm``) and calls the mixers; holds no other weights."""

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]}

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        """x [B,T,D] → [B,T,D]; ``attention`` and ``ffn`` map [B,T,D] to [B,T,D] and are each called once."""
        raise NotImplementedError
