from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32, unlowered
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("residual", "attention_residual")
class AttentionResidual(Residual):
    """Each block reads a mean of all earlier outputs, weighted by an attention over the depth.

    Kimi 2026 (Attention Residuals), arXiv 2603.15031. Sources v₀ (the embedding), v₁, … are kept apart; attention, ffn
    and the final norm read Σ_i softmax_i(w · v_i/√(mean v_i² + ε)) v_i, each with its own query w, and every output is
    a new source. In the block form a source is the sum of ``block`` outputs, so that few have to be kept: the newest is
    added to until it is full. The queries begin at 0: a plain mean, which a norm cannot tell from ``prenorm``'s sum.

    The gain of the paper's norm of the sources is part of w here. The first attention has one source, and no query. The
    sources are the streams of this block: L layers keep up to 2L + 1 of them, or 2L/block + 1. Inkling-2 reads
    normalised sources, which is another block.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
        block: outputs, of attentions and feed-forward blocks, that are added up to one source; 1 keeps all apart
        eps: ε, added to the mean square of a source
    """

    streams = 0

    def __init__(
        self,
        d_model: int,
        n_layers: int,
        layer_idx: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        block: Count = 1,
        eps: Positive = 1e-6,
    ) -> None:
        super().__init__()
        depth = layer_idx if layer_idx < n_layers else 0  # multi-token prediction has sources of its own
        self.starts, self.eps = [(2 * depth + i) % block == 0 for i in range(2)], eps
        self.attention_norm, self.ffn_norm = attention_norm, ffn_norm
        self.attention_query = nn.Parameter(torch.empty(d_model)) if depth else None
        self.ffn_query = nn.Parameter(torch.empty(d_model))
        self.closing_query = nn.Parameter(torch.empty(d_model)) if layer_idx >= n_layers - 1 else None

    def reset_parameters(self) -> None:
        for query in (self.attention_query, self.ffn_query, self.closing_query):
            if query is not None:
                query.zero_()

    def open(self, x: Tensor) -> Tensor:
        return x[:, :, None]

    def close(self, x: Tensor, given: Pass) -> Tensor:
        return self._read(x, self.closing_query)

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = self._added(x, attention(self.attention_norm(self._read(x, self.attention_query))), self.starts[0])
        return self._added(x, ffn(self.ffn_norm(self._read(x, self.ffn_query))), self.starts[1])

    def _read(self, x: Tensor, query: Tensor | None) -> Tensor:
        """Sources [B,T,M,D] → [B,T,D]; without a query, their mean."""
        if query is None:
            return x.mean(2)
        with unlowered(x):
            v = at_least_fp32(x)
            scores = (v * query).sum(-1) * (v.square().mean(-1) + self.eps).rsqrt()
            return (scores.softmax(-1)[..., None] * v).sum(2).to(x.dtype)

    @staticmethod
    def _added(x: Tensor, y: Tensor, starts: bool) -> Tensor:
        """The sources after an output [B,T,D], which is a new one or is added to the newest."""
        y = y[:, :, None]
        return torch.cat((x, y) if starts else (x[:, :, :-1], x[:, :, -1:] + y), 2)
