from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.kernels.elementwise import base_frequencies, rotary_width
from blockwright.blocks.position.rotary import Rotary
from blockwright.registry import register
from blockwright.registry.ranges import Positive, Share, Stretch


@register("position", "rope_linear")
class LinearRoPE(Rotary):
    """RoPE with positions divided by a factor, so that a longer context spans the angles of the trained one.

    Chen et al. 2023 (position interpolation), arXiv 2306.15595: frequency_j = theta^(−2j/R) / factor. Gemma-3's full
    layers (factor 8). Every pair is slowed equally, at the cost of fine distances; ``rope_ntk``, ``rope_llama3`` and
    ``yarn`` spare the fast pairs.

    Args:
        theta: base of the frequencies
        factor: ratio of the new to the trained context length
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        factor: Stretch = 4.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.factor, self.interleaved = theta, factor, pairing == "interleaved"

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        return base_frequencies(self.theta, self.rotary_dim, device) / self.factor
