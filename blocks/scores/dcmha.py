from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.linear import Linear
from blockwright.blocks.scores.base import Scores
from blockwright.registry import register
from blockwright.registry.ranges import Count

EPS = 1e-6


@register("scores", "dcmha")
class DynamicallyComposed(Scores):
    """Heads that are composed for every pair of a query and a key, before the softmax and after it.

    Xiao et al. 2024 (DCMHA), arXiv 2405.08553. With a ∈ R^N what the heads score, or weigh, of query t and key s:
        a ← a + Σ_{u ∈ {t, s}} (Σ_r (a · p_u,r) w_u,r + a ⊙ g_u)
        h_u = GELU(W_h x_u), p_u,r = rms(W_p,r h_u), w_u,r = W_w,r h_u, g_u = tanh(W_g x_u)
    with weights of their own for queries, for keys, before and after; rms is over the heads and has no gain. A
    position's bias and the mask come between both. The cache holds 2 (2 rank + 1) N further numbers a token: p, w and g
    of keys. No fused kernel computes it, so the scores of all T × S pairs are materialised.

    The paper's static map of heads is that of ``talking_heads``, which its code leaves out by default. Its groups of
    heads, over which it splits models, are left out too.

    Args:
        rank: R, directions that are read and written, for a query and for a key; 2 in the paper
        width: of h; null is 4 n_heads, as the paper's 128 for 32 heads
    """

    per_head = False
    conformance_settings: ClassVar[Mapping[str, Any]] = {"rank": 1, "width": 5}

    def __init__(self, d_model: int, n_heads: int, rank: Count = 2, width: Count | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.of_query, self.of_key = (_Compositions(d_model, n_heads, rank, width or 4 * n_heads) for _ in range(2))

    def slots(self) -> dict[str, tuple[int, ...]]:
        return {"compositions": (2, *self.of_key.shape)}

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        return (self.of_key(x),)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        before, after = zip(self.of_query(x).unbind(2), noted[0].unbind(2), strict=True)
        scores = self._composed(torch.einsum("btnh,bsnh->bnts", q, k) * scoring.scale, *before)
        bias = dense(scoring.bias)
        scores = scores if bias is None else scores + bias
        seen = visible(q.shape[1], k.shape[1], q.device, scoring.segments, scoring.window)
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=wide).to(v.dtype)
        return torch.einsum("bnts,bsnv->btnv", self._composed(weights, *after), v)

    def _composed(self, of_pairs: Tensor, of_query: Tensor, of_key: Tensor) -> Tensor:
        """[B,N,T,S] composed by [B,T,2R+1,N] and [B,S,2R+1,N]."""
        found = of_pairs
        for token, compositions in (("t", of_query), ("s", of_key)):
            read, written, gate = compositions.to(of_pairs.dtype).split((self.rank, self.rank, 1), 2)
            directions = torch.einsum(f"bnts,b{token}rn->brts", of_pairs, read)
            found = found + torch.einsum(f"brts,b{token}rn->bnts", directions, written)
            found = found + torch.einsum(f"bnts,b{token}n->bnts", of_pairs, gate[:, :, 0])
        return found

    def neutral(self) -> dict[str, Tensor]:
        names = (f"{side}.{name}" for side in ("of_query", "of_key") for name in ("written", "gate.weight"))
        return {name: torch.zeros_like(self.get_parameter(name)) for name in names}

    def parallel_plan(self) -> dict[str, Placement]:
        names = ("hidden.weight", "read", "written", "gate.weight")
        return {f"{side}.{name}": "replicate" for side in ("of_query", "of_key") for name in names}


class _Compositions(nn.Module):
    """p, w and g of tokens x [B,T,D], [B,T,2,2R+1,N]: before the softmax, and after it."""

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"read": "matrix", "written": "matrix"}

    def __init__(self, d_model: int, n_heads: int, rank: int, width: int) -> None:
        super().__init__()
        self.shape = 2 * rank + 1, n_heads
        self.hidden = Linear(d_model, 2 * width, bias=False)
        self.read, self.written = (nn.Parameter(torch.empty(2, rank * n_heads, width)) for _ in range(2))
        self.gate = Linear(d_model, 2 * n_heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.hidden(x)).unflatten(-1, (2, -1))
        made = (torch.einsum("btck,cok->btco", hidden, to) for to in (self.read, self.written))
        read, written = (numbers.unflatten(-1, (-1, self.shape[1])) for numbers in made)
        gate = self.gate(x).tanh().unflatten(-1, (2, 1, -1))
        return torch.cat((F.rms_norm(read, read.shape[-1:], eps=EPS), written, gate), -2)
