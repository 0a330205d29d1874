from __future__ import annotations

import math

import torch
from torch import Tensor

from blockwright.blocks.base import Drawn, Keys, Queries
from blockwright.blocks.kernels.scoring import Slopes
from blockwright.blocks.position.base import Position
from blockwright.registry import register


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
