"""Several residual streams, which layers read, write and mix; or which stay apart behind gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind
from blockwright.blocks.closing import Closing, GatedRead
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.mixing import Mixing
from blockwright.blocks.norm import Norm
from blockwright.blocks.precision import at_least_fp32, full_linear, unlowered
from blockwright.blocks.residual.base import Mixer, Streams
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


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

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
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


class ManifoldStreams(Streams):
    """Streams that mix without growing or vanishing: the shared base of ``mhc`` and ``read_ahead``."""

    def __init__(
        self,
        d_model: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        mixing: Mixing,
        n_streams: int,
        eps: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.streams, self.mixing = n_streams, mixing
        self.attention_norm, self.ffn_norm = attention_norm, ffn_norm
        self.attention_connection, self.ffn_connection = (
            ManifoldConnection(d_model, n_streams, mixing.n_logits, eps, norm_eps) for _ in range(2)
        )

    def reset_parameters(self) -> None:
        for connection in (self.attention_connection, self.ffn_connection):
            connection.reset_parameters(self.mixing.start())

    def _through(
        self, x: Tensor, connection: ManifoldConnection, mixer: Callable[[Tensor], Tensor], read: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The streams after a mixer, and what ``connection`` reads, [B,T,M]. The mixer's input is of that, or of
        another ``read``."""
        with unlowered(x):
            own, write, logits = connection(x)
            h = weighted(x, own if read is None else read)
        y = mixer(h)
        with unlowered(x):
            return write[..., None].to(x.dtype) * y[:, :, None] + self.mixing(x, logits), own


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Streams [B,T,M,D] and weights [B,T,M] → their sum [B,T,D], in the dtype of the streams."""
    return (weights[..., None] * x).sum(2).to(x.dtype)


@register("residual", "mhc")
class MHC(ManifoldStreams):
    """Manifold-constrained hyper-connections: several streams, which mix without growing or vanishing.

    arXiv 2512.24880; DeepSeek-V4. With streams X [M,D] of a token, for each of attention and ffn:
    [a; b; c] = W r, r = vec(X)/√(mean vec(X)² + norm_eps);
    read = σ(s₁a + b₁) + ε, write = 2σ(s₂b + b₂), x = Σ_i read_i X_i;
    X_i ← write_i f(norm(x)) + Σ_j M_ij X_j with the matrix M = mixing(s₃c + b₃).

    It begins as ``prenorm``: s = 0, write = 1, reads add up to 1, half of it from one stream, which is drawn, and M is
    nearly the identity. DeepSeek's s begin at 0.01, in transformers at 1. GLM-5.3 closes the streams by their mean,
    DeepSeek-V4 by a ``weighted`` sum. In fp32 at least, like routers.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
        mixing: how the streams mix
        closing: how they become one after the last layer
        n_streams: M, residual streams
        eps: ε, added to what is read
        norm_eps: added to the mean square; 1e-5 in GLM-5.3
    """

    default_children: ClassVar[Mapping[str, Any]] = {
        "mixing": {"name": "permutations"},
        "closing": {"name": "mean"},
    }

    def __init__(
        self,
        d_model: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        mixing: Mixing,
        closing: Closing,
        n_streams: Count = 4,
        eps: Positive = 1e-6,
        norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__(d_model, attention_norm, ffn_norm, mixing, n_streams, eps, norm_eps)
        self.closing = closing

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x, _ = self._through(x, self.attention_connection, lambda h: attention(self.attention_norm(h)))
        return self._through(x, self.ffn_connection, lambda h: ffn(self.ffn_norm(h)))[0]


READ = "read_ahead"  # what the next block reads of the streams, [B,T,M], in ``carry``


@register("residual", "read_ahead")
class ReadAhead(ManifoldStreams):
    """``mhc``, of which each block reads the streams by weights that the block before it drew, one mixer ahead.

    DeepSeek-AI 2026 (DeepSeek-V4.1-Flash), by the formulas of transformers (``DeepseekV41DecoderLayer``). With the
    streams X of block i, and read_i, write_i and M_i drawn from them as in ``mhc``:
    x = Σ_j read_{i−1,j} X_j; X_j ← write_{i,j} f(norm(x)) + Σ_k M_i,jk X_k.

    So that all that a block needs is known when the one before it ends. The first one reads stream 0; what the last one
    draws closes the streams, which need no ``closing``. It has the parameters of ``mhc``, and begins as ``prenorm``
    likewise. What is drawn crosses depth beside the streams, also over layers with another residual block.

    Args:
        attention_norm: norm before the attention
        ffn_norm: norm before the feed-forward block
        mixing: how the streams mix
        n_streams: M, residual streams
        eps: ε, added to what is read
        norm_eps: added to the mean square; 1e-20 in DeepSeek-V4.1
    """

    default_children: ClassVar[Mapping[str, Any]] = {"mixing": {"name": "permutations"}}

    def __init__(
        self,
        d_model: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        mixing: Mixing,
        n_streams: Count = 4,
        eps: Positive = 1e-6,
        norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__(d_model, attention_norm, ffn_norm, mixing, n_streams, eps, norm_eps)

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        read = self._read(x, given)
        x, read = self._through(x, self.attention_connection, lambda h: attention(self.attention_norm(h)), read)
        x, read = self._through(x, self.ffn_connection, lambda h: ffn(self.ffn_norm(h)), read)
        if given.carry is not None:
            given.carry[READ] = read
        return x

    def close(self, x: Tensor, given: Pass) -> Tensor:
        with unlowered(x):
            return weighted(x, self._read(x, given))

    def _read(self, x: Tensor, given: Pass) -> Tensor:
        """[B,T,M], what the block before drew; of the first one stream 0."""
        if given.carry is not None and READ in given.carry:
            return given.carry[READ]
        first = (torch.arange(self.streams, device=x.device) == 0).to(at_least_fp32(x).dtype)
        return first.expand(x.shape[:3])


class ManifoldConnection(nn.Module):
    """What is read from the streams of a token, what is written to them, and the logits of their mixing.

    Args:
        d_model: D
        n_streams: M
        n_logits: L
        eps: ε
        norm_eps: added to the mean square
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}

    def __init__(self, d_model: int, n_streams: int, n_logits: int, eps: float, norm_eps: float) -> None:
        super().__init__()
        self.sizes, self.eps, self.norm_eps = [n_streams, n_streams, n_logits], eps, norm_eps
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), n_streams * d_model))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes)))
        self.scale = nn.Parameter(torch.empty(3 if n_logits else 2))

    def reset_parameters(self, mixing: Tensor) -> None:
        n = self.sizes[0]
        read = torch.full((n,), 0.5 / max(n - 1, 1), dtype=torch.float32)
        read[torch.randint(n, ())] = 0.5 if n > 1 else 1 - self.eps
        self.scale.zero_()
        self.bias.copy_(torch.cat(((read - self.eps).logit(1e-6), torch.zeros_like(read), mixing)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [B,T,M,D] → read [B,T,M], write [B,T,M] and logits [B,T,L], in at least fp32."""
        flat, weight = at_least_fp32(x.flatten(2)), at_least_fp32(self.weight)
        drawn = full_linear(flat.flatten(0, 1), weight).unflatten(0, x.shape[:2])
        drawn = drawn * (flat.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        parts = zip(drawn.split(self.sizes, -1), self.bias.split(self.sizes), strict=True)
        a, b, *c = (part * s + bias for (part, bias), s in zip(parts, self.scale, strict=False))
        return a.sigmoid() + self.eps, 2 * b.sigmoid(), c[0] if c else drawn[..., :0]


@register("residual", "gated_streams")
class GatedStreams(Streams):
    """Several residual streams that never mix: each block reads a gated mean of them, and writes to each by a gate.

    Qwen 2026 (Qwen3.8-Flash-Next's gated residual), by the formulas of transformers (``Qwen4ExpTextGatedResidual``).
    With streams X [M,D] of a token, Z_i = norm_i(X_i) and z = vec(Z), for each of attention and ffn:
    G = σ(W_up silu(W_down z / M)) [M,D]; x = Σ_i G_i ⊙ Z_i / M; X_i ← X_i + 2σ(w_i · z / M) f(x).

    The norms are those of the streams: f reads x as it is. What is read has a gate for each channel, where ``mhc`` has
    one for each stream, and what is kept has none. The streams begin as copies, which the random weights of the gates
    tell apart: it does not begin as ``prenorm``, but near one that reads half of its norm.

    Args:
        attention_norm: norm of each stream before the attention; one copy for each
        ffn_norm: the same before the feed-forward block
        closing: how the streams become one after the last layer
        n_streams: M, residual streams
        rank: width of W_down z; null is d_model / 8, as in Qwen3.8-Flash-Next
    """

    default_children: ClassVar[Mapping[str, Any]] = {"closing": {"name": "gated"}}

    def __init__(
        self,
        d_model: int,
        attention_norm: Norm,
        ffn_norm: Norm,
        closing: Closing,
        n_streams: Count = 4,
        rank: Count | None = None,
    ) -> None:
        super().__init__()
        self.streams, self.closing = n_streams, closing
        self.attention_read = GatedRead(d_model, n_streams, attention_norm, rank)
        self.ffn_read = GatedRead(d_model, n_streams, ffn_norm, rank)
        self.attention_write, self.ffn_write = (Linear(n_streams * d_model, n_streams, bias=False) for _ in range(2))

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer, given: Pass) -> Tensor:
        x = self._through(x, self.attention_read, self.attention_write, attention)
        return self._through(x, self.ffn_read, self.ffn_write, ffn)

    def _through(self, x: Tensor, read: GatedRead, write: nn.Module, mixer: Callable[[Tensor], Tensor]) -> Tensor:
        h, z = read(x)
        gates = 2 * (write(z) / self.streams).sigmoid()
        return x + gates[..., None] * mixer(h)[:, :, None]
