from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind
from blockwright.blocks.closing import Closing
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32, unlowered
from blockwright.blocks.residual.base import Mixer, Streams
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("residual", "hyper_connections")
class HyperConnections(Streams):
    """Dynamic hyper-connections: several streams, whose sums into and out of each block are learned.

    Zhu et al. 2024, arXiv 2409.19606, algorithm 2. With streams X [M,D] of a token, for each of attention and ffn:
    [a_i; A_i; b_i] = static_i + s ⊙ tanh(W norm(X_i)), a number, M and a number;
    x = Σ_i a_i X_i; X_j ← b_j f(norm(x)) + Σ_i A_ij X_i. Nothing bounds A: ``mhc`` does.

    It begins as ``prenorm``: s = 0, a reads one stream, A is the identity, b is 1. In the paper s begins at 0.01 and W
    at 0; it reads stream (layer mod M) where here one is drawn, and closes by a sum where here it is the mean, unless
    ``closing`` says otherwise: the same after a norm.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
        attention_stream_norm: norm of each stream, before W, around the attention
        ffn_stream_norm: the same around the feed-forward block
        closing: how the streams become one after the last layer
        n_streams: M, residual streams
    """

    default_children: ClassVar[Mapping[str, Any]] = {"closing": {"name": "mean"}}

    def __init__(
        self,
        d_model: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        attention_stream_norm: Norm,
        ffn_stream_norm: Norm,
        closing: Closing,
        n_streams: Count = 4,
    ) -> None:
        super().__init__()
        self.streams, self.closing = n_streams, closing
        self.attention_norm, self.ffn_norm = attention_norm, ffn_norm
        self.attention_connection = Connection(d_model, n_streams, attention_stream_norm)
        self.ffn_connection = Connection(d_model, n_streams, ffn_stream_norm)

    def reset_parameters(self) -> None:
        self.attention_connection.reset_parameters()
        self.ffn_connection.reset_parameters()

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = self._through(x, self.attention_connection, lambda h: attention(self.attention_norm(h)))
        return self._through(x, self.ffn_connection, lambda h: ffn(self.ffn_norm(h)))

    def _through(self, x: Tensor, connection: Connection, mixer: Callable[[Tensor], Tensor]) -> Tensor:
        with unlowered(x):
            read, mix, write = connection(x)
            h, kept = (read.mT @ x).squeeze(2), mix.mT @ x
        return kept + write * mixer(h)[:, :, None]


class Connection(nn.Module):
    """What is read from the streams of a token, how they mix, and what is written to them.

    Args:
        d_model: D
        n_streams: M
        norm: of each stream
    """

    # The paper decays what depends on the token alone (section 4): A begins as the identity.
    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix", "static": "vector"}

    def __init__(self, d_model: int, n_streams: int, norm: Norm) -> None:
        super().__init__()
        self.norm, self.sizes = norm, [1, n_streams, 1]
        self.weight = nn.Parameter(torch.empty(n_streams + 2, d_model))
        self.static = nn.Parameter(torch.empty(n_streams, n_streams + 2))
        self.scale = nn.Parameter(torch.empty(2))  # of what is read and mixed, and of what is written

    def reset_parameters(self) -> None:
        n = len(self.static)
        read = torch.nn.functional.one_hot(torch.randint(n, ()), n)[:, None]
        self.static.copy_(torch.cat((read, torch.eye(n, dtype=torch.float32), read.new_ones(n, 1)), 1))
        self.scale.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [B,T,M,D] → read [B,T,M,1], mix [B,T,M,M] and write [B,T,M,1], in the dtype of the streams."""
        drawn = (at_least_fp32(self.norm(x)) @ at_least_fp32(self.weight).t()).tanh()
        scale = torch.cat((self.scale[:1].expand(len(self.static) + 1), self.scale[1:]))
        return (drawn * scale + self.static).to(x.dtype).split(self.sizes, -1)
