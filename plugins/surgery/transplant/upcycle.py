"""A dense feed-forward block → a mixture of experts: what its ways have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.experts import SwiGLUExperts
from blockwright.blocks.ffn import MoE, SwiGLU
from blockwright.blocks.gating.base import Gating
from blockwright.plugins.surgery.settings import computes_alike
from blockwright.plugins.surgery.transplant.base import Transplant

PROBES, SAME = 64, 1e-4  # random tokens that a gate weighs, and how equal the sums of its weights must be


class Upcycle(Transplant):
    """``swiglu`` → ``moe`` with experts ``swiglu`` and no shared expert, unless a subclass says otherwise.

    Komatsuzaki et al. 2022, arXiv 2212.05055, begin from copies.
    """

    handles: ClassVar[tuple[str, ...]] = ("name", "gate", "up", "down", "gating", "experts", "shared")

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        mixture = is_plain(old, SwiGLU) and isinstance(new, MoE) and is_plain(new.experts, SwiGLUExperts)
        same_width = mixture and new.experts.down.shape[1] == old.down.out_features  # type: ignore[union-attr,index]
        return same_width and self.suits(old, new)  # type: ignore[arg-type]

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        """Whether their widths suit."""
        raise NotImplementedError


def is_plain(block: Any, cls: type) -> bool:
    """Whether a block computes as this class does: a class that derives from it may add to it."""
    return isinstance(block, cls) and computes_alike(type(block), cls)


def width(experts: nn.Module) -> int:
    """F, hidden width of an expert."""
    return experts.down.shape[2]  # type: ignore[index, return-value]


def stacked(old: SwiGLU, n_experts: int) -> dict[str, Tensor]:
    """``gate_up`` [E,2F,D] and ``down`` [E,D,F] of E copies."""
    gate_up = torch.cat((old.gate.weight, old.up.weight))
    return {
        "experts.gate_up": gate_up.expand(n_experts, -1, -1).clone(),
        "experts.down": old.down.weight.expand(n_experts, -1, -1).clone(),
    }


@torch.no_grad()
def sum_of_weights(gate: Gating, d_model: int, seed: int) -> tuple[float, bool]:
    """What the weights of a token's experts add up to, and whether that is the same for all tokens."""
    x = torch.randn(1, PROBES, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    sums = gate(x, torch.arange(PROBES)[None] % 2).weights.sum(-1)
    mean = float(sums.mean())
    return mean, bool((sums - mean).abs().max() <= SAME * abs(mean))
