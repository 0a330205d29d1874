from __future__ import annotations

from torch import Tensor

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm.base import Norm
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register


@register("residual", "normed_embeddings")
class NormedEmbeddings(Residual):
    """Another residual block, whose stream begins with a norm of the embeddings.

    Inkling (Thinking Machines 2026); BLOOM, arXiv 2211.05100, with a layer norm. The first layer's block, which opens
    the stream, alone has the norm.

    Args:
        residual: connects the mixers, e.g. ``prenorm``
        norm: of the embeddings
    """

    def __init__(self, residual: Residual, norm: Norm, layer_idx: int) -> None:
        super().__init__()
        self.residual, self.norm = residual, norm if layer_idx == 0 else None
        self.streams, self.adds_branches = residual.streams, residual.adds_branches

    def open(self, x: Tensor) -> Tensor:
        return self.residual.open(x if self.norm is None else self.norm(x))

    def close(self, x: Tensor) -> Tensor:
        return self.residual.close(x)

    def mixers(self, attention: Mixer, ffn: Mixer, given: Pass) -> tuple[Mixer, Mixer]:
        return self.residual.mixers(attention, ffn, given)

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        return self.residual(x, attention, ffn)
