from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from blockwright.blocks.kernels.elementwise import base_frequencies, rotary_width
from blockwright.blocks.position.rotary import Rotary
from blockwright.registry import register
from blockwright.registry.ranges import Count, NonNegative, Positive, Share, Stretch


@register("position", "yarn")
class YaRN(Rotary):
    """RoPE stretched to a longer context: slow pairs are interpolated, fast ones kept, and the softmax is sharpened.

    Peng et al. 2023, arXiv 2309.00071, as DeepSeek-V2/V3 use it. With base frequency f_j = theta^(−2j/R) and
    corr(ρ) = R ln(L/(2πρ)) / (2 ln theta): low = ⌊corr(beta_fast)⌋, high = ⌈corr(beta_slow)⌉,
    ramp_j = clamp((j − low)/(high − low), 0, 1), frequency_j = f_j (1 − ramp_j) + f_j/factor · ramp_j.
    With g(m) = 0.1 m ln(factor) + 1: cosines and sines are multiplied by g(mscale)/g(mscale_all_dim), and the
    attention's scale by g(mscale_all_dim)². The YaRN paper and gpt-oss scale rotated queries and keys by g(1) each:
    mscale 1 and mscale_all_dim 0.

    The stretch applies at every length, as in the Hugging Face implementations; DeepSeek's inference code applies it
    only beyond the original context. transformers before 5 omitted the g² in DeepSeek-V2.

    Args:
        theta: base of the frequencies
        factor: ratio of the new to the original context length
        original_positions: L, original context length in tokens
        beta_fast: rotations over the original context above which a pair is unchanged
        beta_slow: rotations below which a pair is fully interpolated
        mscale: m of the amplitude; 0.707 in V2, 1.0 in V2.5 and V3
        mscale_all_dim: m of the softmax temperature; 0 leaves the softmax unchanged and scales the amplitude only
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair; released MLA weights are interleaved
        truncate: whether low and high are rounded outwards to whole pairs; false in gpt-oss
    """

    def __init__(
        self,
        head_dim: int,
        theta: Annotated[float, Gt(1)] = 10000.0,
        factor: Stretch = 40.0,
        original_positions: Count = 4096,
        beta_fast: Positive = 32.0,
        beta_slow: Positive = 1.0,
        mscale: NonNegative = 1.0,
        mscale_all_dim: NonNegative = 1.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "interleaved",
        truncate: bool = True,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.factor, self.original_positions = theta, factor, original_positions
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.interleaved, self.truncate = pairing == "interleaved", truncate
        self.amplitude = self._gain(mscale) / self._gain(mscale_all_dim)
        self.softmax_scale = self._gain(mscale_all_dim) ** 2

    def _gain(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def _pair_with(self, turns: float) -> float:
        """Index of the pair with this many rotations over the original context."""
        numerator = self.rotary_dim * math.log(self.original_positions / (2 * math.pi * turns))
        return numerator / (2 * math.log(self.theta))

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        pairs = torch.arange(self.rotary_dim // 2, device=device, dtype=torch.float32)
        base = base_frequencies(self.theta, self.rotary_dim, device)
        low, high = self._pair_with(self.beta_fast), self._pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
        return base * (1 - ramp) + base / self.factor * ramp
