"""A state that grows with the logarithm of the number of tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.mamba import Mamba2
from blockwright.blocks.attention.recurrent import Parts
from blockwright.blocks.base import Kind
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative, Positive, Taps


@register("attention", "log_linear_mamba2")
class LogLinearMamba2(Mamba2):
    """Mamba-2 that reads near tokens apart from far ones: a state for each power of two of their distance.

    Guo et al. 2025 (Log-Linear Attention), arXiv 2506.04761, by the formulas of flash-linear-attention
    (``naive_log_linear_attn`` and its layer). All is as in ``mamba2``, but for y = Σ_ℓ λ_ℓ S_ℓᵀ q + d v with
    λ_ℓ = softplus(f_ℓ w_ℓ · x) for each head. S_0 is of the token itself, and S_ℓ of the 2^(ℓ−1) tokens that begin
    where position t, without its lowest ℓ bits, says, if bit ℓ − 1 of t is set: so t reads token s at the level of the
    highest bit in which they differ. These buckets are those of a Fenwick tree and hold each token before t once. With
    all λ equal to 1 it is ``mamba2``. At the start f = 1.

    A level is a linear recurrence that begins again every 2^ℓ tokens, that the first half of them writes and the
    second half reads, so n levels cost as much as n of ``mamba2``, where the paper merges states. The cache holds the
    states of all ``levels``, the logarithm of the most tokens; training computes those that its window has.

    Args:
        levels: of distance, the token itself included; a sequence has at most 2^(levels − 1) tokens
    """

    weight_kinds: ClassVar[dict[str, Kind]] = {"share": "vector"}
    conformance_settings: ClassVar[dict[str, object]] = {**Mamba2.conformance_settings, "levels": 10}

    def __init__(
        self,
        d_model: int,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        state_dim: Count = 128,
        n_groups: Count = 1,
        taps: Taps = 4,
        least_step: NonNegative = 0.0,
        eps: Positive = 1e-5,
        levels: Count = 15,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim, state_dim, n_groups, taps, least_step, eps)
        self.level = Linear(d_model, n_heads * levels, bias=False)
        self.share = nn.Parameter(torch.empty(n_heads, levels))  # f

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.share.fill_(1.0)

    def scan(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, segments: Tensor | None, held: State | None
    ) -> tuple[Tensor, Parts]:
        n = self._levels(x.shape[1] if held is None else held.length + x.shape[1])
        n = n if held is None else self.share.shape[1]  # later tokens read what these write
        weights = F.softplus(self.share * at_least_fp32(self.level(x)).unflatten(-1, self.share.shape))
        own = (q * k).sum(-1, keepdim=True) * v
        y = weights[..., :1] * own
        if n == 1:
            return y, {}
        places, documents = _places(x, segments, held)
        levels = torch.arange(1, n, device=x.device)[:, None, None]
        blocks = places >> levels  # [n−1,B,T]
        reads = (places >> (levels - 1)) & 1
        if documents is not None:
            blocks = blocks + documents * (x.shape[1] + 1)
        state = None if held is None else held.held["state"].transpose(0, 1)
        if state is not None:
            starts = (places[..., :1] & ((1 << levels) - 1)) == 0  # nothing is left of a block that ended
            state = (state * ~starts[..., None, None]).flatten(0, 1)
        q, v, decay = (t.expand(n - 1, *t.shape).flatten(0, 1) for t in (q, v, decay))
        k = (k * (1 - reads)[..., None, None]).flatten(0, 1)
        found, state = self.kernels.recur(q, k, v, decay, None, state, blocks.flatten(0, 1), None, None)
        read = weights[..., 1:n].movedim(-1, 0) * reads[..., None]  # [n−1,B,T,N]
        y = y + (read[..., None] * found.unflatten(0, (n - 1, -1))).sum(0)
        return y, {"state": state.unflatten(0, (n - 1, -1)).transpose(0, 1)}

    def _levels(self, length: int) -> int:
        """How many levels this many tokens have."""
        levels = self.share.shape[1]
        if length > 1 << (levels - 1):
            rule = f"are levels of at most {1 << (levels - 1)} tokens, of {length}"
            raise BlockError("levels", levels, rule, f"Use {(length - 1).bit_length() + 1} or more")
        return (length - 1).bit_length() + 1

    def memory(self) -> dict[str, tuple[int, ...]]:
        state, deeper = super().memory()["state"], self.share.shape[1] - 1
        return {"state": (deeper, *state)} if deeper else {}


def _places(x: Tensor, segments: Tensor | None, held: State | None) -> tuple[Tensor, Tensor | None]:
    """Places [B|1,T] of the tokens in their documents, at least 0, and a number for each document of a row."""
    order = torch.arange(x.shape[1], device=x.device)
    if held is not None:
        begins = 0 if held.padding is None else held.padding[:, None]
        return (held.length + order - begins).clamp(min=0).expand(len(x), -1), None
    if segments is None:
        return order.expand(len(x), -1), None
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    return order - (order * begins).cummax(1).values, begins.cumsum(1)
