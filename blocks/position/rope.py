from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.kernels.elementwise import base_frequencies, rotary_width
from blockwright.blocks.position.rotary import Rotary
from blockwright.registry import register
from blockwright.registry.ranges import Positive, Share


@register("position", "rope")
class RoPE(Rotary):
    """Rotary position embedding: pairs of dimensions are rotated by an angle proportional to the position.

    Su et al. 2021, arXiv 2104.09864: pair j of R/2 rotates by t · theta^(−2j/R); scores depend on distances only.

    Pairs are (j, j + R/2) as in Llama, Mixtral and Qwen checkpoints (``half_split``), or (2j, 2j + 1) as in the paper
    and every MLA checkpoint (``interleaved``). With the same weights the two differ; permuting the rows of the query
    and key projections maps one to the other. Angles are fp32 whatever the model's precision.

    Args:
        theta: base of the frequencies; larger rotates slower and reaches further
        rotary_fraction: leading fraction of the head width that is rotated; the rest is unchanged (GPT-NeoX, Phi)
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta = theta
        self.interleaved = pairing == "interleaved"

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        return base_frequencies(self.theta, self.rotary_dim, device)
