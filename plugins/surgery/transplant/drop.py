from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from blockwright.blocks.ffn import SwiGLU
from blockwright.plugins.surgery.transplant.base import Setting, Transplanted
from blockwright.plugins.surgery.transplant.copies import Copies
from blockwright.registry import register
from blockwright.registry.ranges import Share


@register("transplant", "drop")
class Drop(Copies):
    """Copies of the dense block, of which a share of the hidden units is drawn again in each expert.

    Nakamura et al. 2025 (Drop-Upcycling), arXiv 2502.19261: the same units in gate, up and down, from a normal
    distribution with the mean and deviation of each matrix. Not exact; the paper's best in long training.

    Args:
        share: r, share of the hidden units that is drawn
    """

    automatic = False

    def __init__(self, share: Share = 0.5) -> None:
        self.share = share

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, SwiGLU)
        made = super().__call__(old, new, setting)
        gate_up, down = made.tensors["experts.gate_up"], made.tensors["experts.down"]
        F, generator = down.shape[2], torch.Generator().manual_seed(setting.seed)
        number = round(self.share * F)
        for expert in range(len(down)):
            units = torch.randperm(F, generator=generator)[:number]
            for rows in (gate_up[expert][:F], gate_up[expert][F:], down[expert].T):
                std, mean = torch.std_mean(rows)
                rows[units] = mean + std * torch.randn(number, rows.shape[1], generator=generator, dtype=torch.float32)
        drawn = 3 * number * down.shape[1] * len(down)
        return replace(made, exact=False, drawn=drawn, note=f"{self.share:.0%} of the hidden units drawn again")
