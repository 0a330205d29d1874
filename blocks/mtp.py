"""Multi-token prediction: additional modules trained to predict later tokens, removable afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.norm import Norm


def later_targets(targets: Tensor, segments: Tensor | None, k: int) -> Tensor:
    """Targets of depth k: targets [B,T] and document ids [B,T] → [B,T−k], −100 across documents."""
    aim = targets[:, k:]
    return aim if segments is None else aim.masked_fill(segments[:, k:] != segments[:, :-k], IGNORED)


class MTP(nn.Module):
    """One depth of multi-token prediction.

    DeepSeek-V3, arXiv 2412.19437, §2.2: h'_i = W [norm(embedding of token i+k); norm(h_i)], one decoder layer, a norm,
    and the main model's head, which predicts token i+k+1. Embedding and head are the main model's own.

    The order inside the concatenation is that of the released weights (``eh_proj``): embedding first, where the paper's
    equation has the hidden state first. h_i of depth 1 is the main model's state after its final norm, which is what
    vLLM and transformers use; the paper does not specify it. The input of depth k + 1 from depth k is normalised too.
    Its layer opens and closes residual streams of its own, and is the first in depth for what layers carry.

    Args:
        embedding_norm: of the embedding, ``enorm``
        hidden_norm: of the hidden state, ``hnorm``
        project: [D,2D], ``eh_proj``
        layer: one decoder layer, built like the last of the main model
        norm: before the head, ``shared_head.norm``
    """

    def __init__(
        self, embedding_norm: Norm, hidden_norm: Norm, project: nn.Linear, layer: nn.Module, norm: Norm
    ) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.project = embedding_norm, hidden_norm, project
        self.layer, self.norm = layer, norm

    def forward(self, embedded: Tensor, hidden: Tensor, given: Pass) -> tuple[Tensor, Routing | None]:
        """Embeddings [B,T,D] of the tokens, and the states [B,T,D] of those k before → states [B,T,D]."""
        x = self.project(torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), -1))
        x, routing, _ = self.layer(x, given._replace(embedded=x))
        return self.norm(x), routing
