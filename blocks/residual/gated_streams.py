"""Several residual streams behind gates, which never mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from blockwright.blocks.closing import Closing, GatedRead
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Mixer, Streams
from blockwright.registry import register
from blockwright.registry.ranges import Count


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

    def forward(self, x: Tensor, attention: Mixer, ffn: Mixer) -> Tensor:
        x = self._through(x, self.attention_read, self.attention_write, attention)
        return self._through(x, self.ffn_read, self.ffn_write, ffn)

    def _through(self, x: Tensor, read: GatedRead, write: nn.Module, mixer: Callable[[Tensor], Tensor]) -> Tensor:
        h, z = read(x)
        gates = 2 * (write(z) / self.streams).sigmoid()
        return x + gates[..., None] * mixer(h)[:, :, None]
