from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.position.rope import RoPE
from blockwright.registry import register
from blockwright.registry.ranges import Positive, Share


@register("position", "rope_fastest")
class RoPEFastest(RoPE):
    """Rotary positions in which only the fastest pairs turn, and the others keep no position (p-RoPE).

    Barbero et al. 2024, arXiv 2410.06205; Gemma-4 (``proportional``): pair j of H/2 rotates by t · theta^(−2j/H) for
    j < rotary_fraction · H/2, else by 0. ``rope`` with the same fraction takes its pairs from the first part of the
    head, and spreads all frequencies over them.

    Args:
        theta: base of the frequencies
        rotary_fraction: share of the pairs that turn, at least one; 0.25 in Gemma-4
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        rotary_fraction: Share = 0.25,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__(head_dim, theta, pairing=pairing)
        self.n_turning = max(1, int(head_dim * rotary_fraction) // 2)

    def frequencies(self, device: torch.device) -> Tensor:
        every = super().frequencies(device)
        return every * (torch.arange(len(every), device=device) < self.n_turning)
