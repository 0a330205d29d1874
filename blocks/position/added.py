"""Positions that are added to the embeddings."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Positive


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
