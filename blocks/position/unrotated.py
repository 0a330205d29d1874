"""Positions that rotate nothing: added to the embeddings, or changing scores by distance or by where the query is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Drawn, Keys, Kind, Placement, Queries, number
from blockwright.blocks.kernels.scoring import Band, Bias, Slopes, dense, times
from blockwright.blocks.linear import Linear
from blockwright.blocks.position.base import Around, Position
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive


@register("position", "learned")
class Learned(Position):
    """A learned vector for each position, added to the embeddings.

    Radford et al. 2019 (GPT-2); Gehring et al. 2017, arXiv 1705.03122: x_t ← x_t + P[t]. Limited to the model's
    ``max_positions``.
    """

    place: ClassVar[Literal["attention", "embedding"]] = "embedding"

    def __init__(self, d_model: int, max_positions: int) -> None:
        super().__init__()
        self.limit = max_positions
        self.embedding = nn.Embedding(max_positions, d_model)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.embedding(positions)


@register("position", "sinusoidal")
class Sinusoidal(Position):
    """Fixed sines and cosines of the position, added to the embeddings.

    Vaswani et al. 2017, arXiv 1706.03762: P[t, 2j] = sin(t/theta^(2j/D)), P[t, 2j+1] = cos(t/theta^(2j/D)).
    The paper multiplies embeddings by √D to bring both to one scale; here ``scale`` shrinks the signal instead, so the
    initialisation of the embedding stays as configured.

    Args:
        theta: base of the wavelengths
        scale: amplitude of the signal; embeddings are initialised with a standard deviation of 0.006 to 0.02
    """

    place: ClassVar[Literal["attention", "embedding"]] = "embedding"

    def __init__(self, d_model: int, theta: Positive = 10000.0, scale: Positive = 0.02) -> None:
        super().__init__()
        if d_model % 2:
            raise BlockError("d_model", d_model, "sines and cosines come in pairs", "Choose an even d_model")
        self.d_model, self.theta, self.scale = d_model, theta, scale

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        exponents = torch.arange(0, self.d_model, 2, device=x.device, dtype=torch.float32) / self.d_model
        angles = positions[..., None].float() * self.theta**-exponents
        signal = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
        return x + (self.scale * signal).to(x.dtype)


@register("position", "alibi")
class ALiBi(Position):
    """A penalty on the scores that grows linearly with distance, with a fixed slope per head.

    Press et al. 2021, arXiv 2108.12409: score(i, j) −= m_n · (i − j), with slopes m_n = 2^(−8n/N), n = 1…N, when N is
    a power of two; otherwise those of the next lower power P, followed by every second slope of 2P.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def drawn(self) -> Drawn:
        return Drawn(acts="scores")

    def slopes(self, device: torch.device) -> Tensor:
        """[N] fp32, one per head; computed on the device, so that nothing is copied from the host."""
        power = 2 ** math.floor(math.log2(self.n_heads))
        first, between = _geometric(power, device), _geometric(2 * power, device)[::2][: self.n_heads - power]
        return torch.cat((first, between)).float()

    def bias(self, queries: Queries, keys: Keys) -> Slopes:
        return Slopes(self.slopes(keys.positions.device), queries.positions, keys.positions)


def _geometric(n: int, device: torch.device) -> Tensor:
    return torch.exp2(torch.arange(1, n + 1, device=device, dtype=torch.float64) * (-8.0 / n))


@register("position", "banded")
class Banded(Around):
    """A learned bias by distance, which every query mixes for each of its heads from a bank of profiles.

    Inkling (Thinking Machines 2026), as in transformers: with r_t = W x_t, [N,rank], and a bank P [rank,extent] that
    all heads of a layer share, score_n(t, s) += r_t,n · P[:, t − s] for 0 ≤ t − s < extent, and nothing beyond. It is
    Inkling's only position: nothing is rotated. The cache holds nothing of it. Here it may be added to another one.

    Args:
        rank: numbers that a head makes of a query; 16 in Inkling
        extent: tokens that the bias reaches back, the query's own included; 1,024 in Inkling, and the window where
            there is one
        inner: a further position, whose bias is added; null, as in Inkling, for none
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"bank": "table"}
    conformance_settings: ClassVar[Mapping[str, Any]] = {"rank": 3, "extent": 5}

    def __init__(
        self, d_model: int, n_heads: int, rank: Count = 16, extent: Count = 1024, inner: Position | None = None
    ) -> None:
        super().__init__(inner)
        self.mixture = Linear(d_model, n_heads * rank, bias=False)
        self.bank = nn.Parameter(torch.empty(rank, extent))

    def drawn(self) -> Drawn:
        rank, extent = self.bank.shape
        return Drawn((f"{number(rank)} profiles of {number(extent)} distances",), acts="scores")

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        mixture = self.mixture(queries.x).unflatten(-1, (-1, len(self.bank)))
        band = Band(mixture @ self.bank.to(mixture.dtype), queries.positions, keys.positions)
        further = dense(super().bias(queries, keys))
        return band if further is None else band.dense() + further

    def neutral(self) -> dict[str, Tensor]:
        return {"bank": torch.zeros_like(self.bank)}

    def parallel_plan(self) -> dict[str, Placement]:
        return {"mixture.weight": "column"}


class Grown(Around):
    """Queries that grow with their position, after another position has rotated them."""

    def grown(self, q: Tensor, positions: Tensor) -> Tensor:
        """Queries q [B,T,N,H] at positions [B|1,T] → the same shape."""
        raise NotImplementedError

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate(q, k, positions)
        return self.grown(q, positions), k

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate_in(q, k, positions, length)
        return self.grown(q, positions), k


@register("position", "log_scaled")
class LogScaled(Grown):
    """Scores that grow with the logarithm of the query's position from a floor on, those of ``inner``'s bias too.

    Inkling (Thinking Machines 2026), as in transformers: all scores of query t, and their bias, are multiplied by
    1 + scale · ln(max((t + 1)/floor, 1)). Products with the factor are rounded once, to the
    queries' precision.

    Args:
        inner: the position whose scores grow; null for none
        scale: growth; 0.1 in Inkling
        floor: tokens up to which nothing grows
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"floor": 3}  # seen within a few tokens

    def __init__(self, scale: Positive = 0.1, floor: Count = 128000, inner: Position | None = None) -> None:
        super().__init__(inner)
        self.scale, self.floor = scale, floor

    def drawn(self) -> Drawn:
        return Drawn(acts="scores")

    def growth(self, positions: Tensor) -> Tensor:
        """[B|1,T] fp64."""
        return 1 + self.scale * ((positions + 1).double() / self.floor).clamp(min=1).log()

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        return times(super().bias(queries, keys), self.growth(queries.positions))

    def grown(self, q: Tensor, positions: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q.to(wide) * self.growth(positions)[..., None, None].to(wide)).to(q.dtype)


@register("position", "log_temperature")
class LogTemperature(Grown):
    """Queries that grow with the logarithm of their position, so that attention stays as sharp among more keys.

    Llama-4, from Nakanishi 2025 (scalable softmax), arXiv 2501.19399: q_t ← q_t (1 + scale · ln(1 + ⌊(t + 1)/every⌋)).
    Llama-4 has it in its layers without positions. A bias of ``inner`` does not grow: see ``log_scaled``.

    Args:
        inner: a further position block, called first; null for none
        scale: growth; 0.1 in Llama-4
        every: tokens between two steps; 8192 in Llama-4
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 3}  # seen within a few tokens

    def __init__(self, scale: Positive = 0.1, every: Count = 8192, inner: Position | None = None) -> None:
        super().__init__(inner)
        self.scale, self.every = scale, every

    def drawn(self) -> Drawn:
        return Drawn(acts="queries")

    def grown(self, q: Tensor, positions: Tensor) -> Tensor:
        growth = 1 + self.scale * ((positions + 1) // self.every).float().log1p()
        return q * growth[..., None, None].to(q.dtype)
