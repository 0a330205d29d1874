from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.entry.base import Entry, Norm
from blockwright.blocks.kernels.few_rows import linear
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative


@register("entry", "adapter")
class Adapter(Entry):
    """A matrix reads the state of the loop and what entered it, and the loop starts from noise.

    Huginn, arXiv 2502.05171: h ← core(W [h; e]) with h₀ ~ N(0, σ²), cut off at 3 σ; the layers behind the loop read
    norm(h), by the model's final norm, as in the released code. In evaluation h₀ is 0, where that code draws it unless
    it is asked for deterministic states: the tokens in a cache then do not depend on the draw.

    Args:
        noise: σ in training; √0.4 in Huginn. 0: the loop starts from zeros
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}
    injects: ClassVar[bool] = True

    def __init__(self, d_model: int, noise: NonNegative = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.empty(d_model, 2 * d_model))

    def forward(self, x: Tensor, entered: Tensor, n: int, norm: Norm) -> Tensor:
        h = x if n else self._start(entered)
        return linear(torch.cat((h, entered), -1), self.weight)

    def leave(self, x: Tensor, norm: Norm) -> Tensor:
        return norm(x)

    def _start(self, like: Tensor) -> Tensor:
        if not self.training or not self.noise:
            return torch.zeros_like(like)
        uniform = 2 * torch.rand(like.shape, device=like.device, dtype=torch.float32) - 1
        normal = 2**0.5 * (math.erf(3 / 2**0.5) * uniform).erfinv()  # between −3 and 3
        return (self.noise * normal).to(like.dtype)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate"}
