from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Around, Residual
from blockwright.registry import register


@register("residual", "normed_embeddings")
class NormedEmbeddings(Around):
    """Another residual block, whose stream begins with a norm of the embeddings.

    Inkling (Thinking Machines 2026); BLOOM, arXiv 2211.05100, with a layer norm. The first layer's block, which opens
    the stream, alone has the norm.

    Args:
        residual: connects the mixers; ``prenorm`` if none is named
        norm: of the embeddings
    """

    default_children: ClassVar[Mapping[str, Any]] = {"residual": {"name": "prenorm"}}

    def __init__(self, residual: Residual, norm: Norm, layer_idx: int) -> None:
        super().__init__(residual)
        self.norm = norm if layer_idx == 0 else None

    def open(self, x: Tensor) -> Tensor:
        return super().open(x if self.norm is None else self.norm(x))
