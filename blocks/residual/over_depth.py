"""Choices over depth: which outputs of lower layers a block reads, and which tokens a layer computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Kind
from blockwright.blocks.forward_pass import Losses, Pass
from blockwright.blocks.norm import Norm
from blockwright.blocks.over_ranks import OverRanks
from blockwright.blocks.precision import at_least_fp32, full_linear, unlowered
from blockwright.blocks.residual.base import Mixer, Residual
from blockwright.registry import register
from blockwright.registry.ranges import Count, NonNegative, Positive, Share


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


@register("residual", "mixture_of_depths")
class MixtureOfDepths(OverRanks, Residual):
    """A router chooses the tokens that a layer changes; the others skip it.

    Raposo et al. 2024, arXiv 2404.02258: r = w·x, y = attention(norm₁(x)), d = y + ffn(norm₂(x + y));
    x_t ← x_t + r_t d_t for the c T tokens of a row that have the highest r, x_t else. That choice depends on later
    tokens, so in evaluation a predictor makes it from the token alone: σ(u·x_t) > ½. It learns what the router chose,
    by a cross-entropy whose gradient reaches u only, as in the paper's second variant.

    Tokens that skip are keys and values all the same, which they are not in the paper: every token is in the cache, and
    the rows of a batch stay alike. So training saves the feed-forward block's share of the FLOPs alone, and decoding
    none. In the paper every second layer has such a block: ``layout: {residual: prenorm mixture_of_depths}``.
    Padding takes part in the choice. The tokens chosen are not neighbours, so that a feed-forward block with
    convolutions, or with a branch that is added in another layer, is refused.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
        capacity: c, share of the tokens; 1/8 in the paper
        predictor_loss: weight of the predictor's loss, a mean over tokens
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"router": "matrix", "predictor": "matrix"}
    causal: ClassVar[bool] = False
    decides: ClassVar[str | None] = "chosen"
    selects = True
    conformance_settings: ClassVar[Mapping[str, Any]] = {"capacity": 0.5}

    def __init__(
        self,
        d_model: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        capacity: Share = 0.125,
        predictor_loss: NonNegative = 0.01,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm
        self.capacity, self.predictor_loss = capacity, predictor_loss
        self.router = nn.Parameter(torch.empty(1, d_model))
        self.predictor = nn.Parameter(torch.empty(1, d_model))

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        y, r = attention(self.attention_norm(x)), self._scores(x, self.router).to(x.dtype)[..., None]
        if self.training:
            places = self.chosen(x)
            some, y, r = (_at(t, places) for t in (x, y, r))
            d = y + ffn(self.ffn_norm(some + y), places)
            return x.scatter(1, places[..., None].expand_as(some), some + r * d)
        d = y + ffn(self.ffn_norm(x + y))
        return torch.where(self._scores(x, self.predictor)[..., None] > 0, x + r * d, x)

    def losses(self, x: Tensor, real: Tensor | None) -> Losses:
        places = self.chosen(x)
        logits = self._scores(x.detach(), self.predictor)
        chosen = torch.zeros_like(logits).scatter(1, places, 1.0)
        each = F.binary_cross_entropy_with_logits(logits, chosen, reduction="none")
        return {"depth_predictor": self.predictor_loss * self.mean(each, real)}

    def chosen(self, x: Tensor) -> Tensor:
        """[B,k], places of the chosen tokens in their rows, in order."""
        k = max(1, int(self.capacity * x.shape[1]))
        return self._scores(x, self.router).topk(k, 1).indices.sort(1).values

    @staticmethod
    def _scores(x: Tensor, weight: Tensor) -> Tensor:
        """[B,T], in fp32 at least."""
        with unlowered(x):
            return full_linear(at_least_fp32(x.flatten(0, 1)), at_least_fp32(weight)).view(x.shape[:2])


def _at(x: Tensor, places: Tensor) -> Tensor:
    """[B,T,D] → [B,k,D], at places [B,k]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
