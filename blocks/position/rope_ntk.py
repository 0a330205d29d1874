from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.kernels.elementwise import base_frequencies, rotary_width
from blockwright.blocks.position.rotary import Rotary
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Positive, Share, Stretch


@register("position", "rope_ntk")
class NTKRoPE(Rotary):
    """RoPE with a larger base, so that the slowest pair is stretched by the factor and the fastest hardly changes.

    bloc97 2023 ("NTK-aware scaled RoPE"), described in arXiv 2309.00071, §3.1: theta' = theta · factor^(R/(R−2)).

    The base is fixed, so cached keys stay valid however long the sequence grows. transformers' ``dynamic`` type lets
    theta grow with the sequence length, replacing the factor by factor · length/trained − (factor − 1).

    Args:
        theta: base of the frequencies as trained
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
        if self.rotary_dim < 4:
            rule = "needs at least two pairs: the exponent R/(R − 2) is infinite for one"
            raise BlockError("rotary_fraction", rotary_fraction, rule, "Choose wider heads")
        self.theta = theta * factor ** (self.rotary_dim / (self.rotary_dim - 2))
        self.interleaved = pairing == "interleaved"

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        return base_frequencies(self.theta, self.rotary_dim, device)
