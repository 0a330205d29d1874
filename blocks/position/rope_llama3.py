from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.kernels.elementwise import base_frequencies, rotary_width
from blockwright.blocks.position.rotary import Rotary
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive, Share, Stretch


@register("position", "rope_llama3")
class Llama3RoPE(Rotary):
    """RoPE with Llama-3.1's context extension: slow pairs divided by the factor, fast ones kept, blended in between.

    Grattafiori et al. 2024 (Llama 3), arXiv 2407.21783, with the formula of the released code. With w_j = 2π/f_j the
    pair's wavelength and L the original context: f_j is kept if w_j < L/high_freq_factor, divided by ``factor`` if
    w_j > L/low_freq_factor, else (1 − s) f_j/factor + s f_j with
    s = (L/w_j − low_freq_factor)/(high_freq_factor − low_freq_factor).

    Unlike ``yarn`` it blends by frequency, not by pair index, and does not change the softmax.

    Args:
        theta: base of the frequencies; 500000 in Llama-3
        factor: divisor of slow frequencies; 8 in Llama-3.1
        low_freq_factor: rotations over the original context below which a pair is fully slowed
        high_freq_factor: rotations above which a pair is unchanged
        original_positions: L, trained context length in tokens
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 500000.0,
        factor: Stretch = 8.0,
        low_freq_factor: Positive = 1.0,
        high_freq_factor: Positive = 4.0,
        original_positions: Count = 8192,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        if not high_freq_factor > low_freq_factor:
            rule = f"must be above low_freq_factor ({low_freq_factor})"
            raise BlockError("high_freq_factor", high_freq_factor, rule, "Use 1 and 4, as Llama-3.1")
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.factor, self.interleaved = theta, factor, pairing == "interleaved"
        self.low, self.high, self.original_positions = low_freq_factor, high_freq_factor, original_positions

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        base = base_frequencies(self.theta, self.rotary_dim, device)
        turns = self.original_positions * base / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * base / self.factor + kept * base
