"""The contract of ``scores``: turn attention scores into weights, in place of a plain softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Drawn, Kind, Placement, Remembering
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.scoring import Scoring, dense
from blockwright.blocks.linear import Linear
from blockwright.registry import family, register
from blockwright.registry.ranges import Count, Positive


@family("scores", context=("d_model", "n_heads"))
class Scores(Remembering):
    """A child of attention that replaces ``blockwright.blocks.kernels.attention.causal_attention``.

    It may depend on the tokens that attend, and on what it has noted of each key (blocks/base.py). Context:
    ``d_model`` (their width), ``n_heads`` (of the queries).

    A class whose heads depend on each other says ``per_head = False``: such heads are not split over ranks, and no rows
    of the weights are those of one head's scores.
    """

    per_head: ClassVar[bool] = True

    def drawn(self) -> Drawn:
        return Drawn(acts="scores")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        """Attention of the last T of S tokens on all previous ones.

        Args:
            q: [B,T,N,H]
            k: [B,S,K,H]; a ring gives keys in the order in which it stores them
            v: [B,S,K,V]
            scoring: without sinks and cap
            x: [B,T,D], the attention's input
            noted: [B,S,…] for each of its ``slots``

        Returns:
            [B,T,N,V]
        """
        raise NotImplementedError


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


@register("scores", "sinks")
class Sinks(Scores):
    """A learned score per head that competes with all keys and has no value, so a head may attend to nothing.

    gpt-oss, arXiv 2508.10925; Xiao et al. 2023, arXiv 2309.17453, with a number in place of a token:
    w_j = exp(s_j) / (exp(sink_n) + Σ_i exp(s_i)). Computed as one more key of zeros, with value zero and the sink as
    its score. Sinks start at 0.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(n_heads))

    def reset_parameters(self) -> None:
        self.sinks.zero_()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        return self.kernels.attend(q, k, v, scoring._replace(sinks=self.sinks))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"sinks": "column"}


@register("scores", "softcap")
class Softcap(Scores):
    """Scores bounded to ±cap before the softmax.

    Bello et al. 2016, arXiv 1611.09940; Gemma-2, arXiv 2408.00118: softmax(cap · tanh(q·k scale / cap)). A position's
    bias is added after the cap, and masked keys are masked after it. No fused kernel of torch computes it, so the
    scores of all T × S pairs are materialised.

    Args:
        cap: bound of the scores; 50 in Gemma-2
    """

    def __init__(self, cap: Positive = 50.0) -> None:
        super().__init__()
        self.cap = cap

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        return self.kernels.attend(q, k, v, scoring._replace(softcap=self.cap))


@register("scores", "talking_heads")
class TalkingHeads(Scores):
    """Heads that hear each other's scores, and each other's weights.

    Shazeer et al. 2020, arXiv 2003.02436: w = P_w softmax(P_l (q·k scale)), with P_l and P_w [N,N] over the heads; a
    position's bias and the mask come between P_l and the softmax. Both start as the identity, so as a plain softmax.
    No fused kernel computes it, so the scores of all T × S pairs are materialised.
    """

    # They begin as the identity: decay would silence the heads.
    weight_kinds: ClassVar[Mapping[str, Kind]] = {"of_scores": "vector", "of_weights": "vector"}
    per_head = False

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.of_scores, self.of_weights = (nn.Parameter(torch.empty(n_heads, n_heads)) for _ in range(2))

    def reset_parameters(self) -> None:
        nn.init.eye_(self.of_scores)
        nn.init.eye_(self.of_weights)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, x: Tensor, noted: tuple[Tensor, ...]
    ) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        scores = torch.einsum("mn,btnh,bsnh->bmts", self.of_scores, q, k) * scoring.scale
        bias = dense(scoring.bias)
        scores = scores if bias is None else scores + bias
        seen = visible(q.shape[1], k.shape[1], q.device, scoring.segments, scoring.window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(
            -1, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        return torch.einsum("mn,bnts,bsmv->btmv", self.of_weights, weights.to(v.dtype), v)

    def neutral(self) -> dict[str, Tensor]:
        heads = torch.eye(len(self.of_scores), dtype=torch.float32)
        return {"of_scores": heads, "of_weights": heads.clone()}
