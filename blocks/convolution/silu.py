from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.convolution.base import Convolution
from blockwright.blocks.convolution.canon import Taps
from blockwright.blocks.depthwise import weighted
from blockwright.registry import register


@register("convolution", "silu")
class SiLU(Convolution):
    """The short convolution of linear attentions: u_t ← silu(Σ_{i<taps} w_i ⊙ u_{t−i}), without a residual.

    Mamba, arXiv 2312.00752; Gated DeltaNet, arXiv 2412.06464, on queries, keys and values. ``gated_delta`` and its
    relatives have theirs built in. No bias.

    Args:
        taps: tokens seen, the current one included
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "filter"}

    def __init__(self, dim: int, taps: Taps = 4) -> None:
        super().__init__(dim, taps - 1)
        self.weight = nn.Parameter(torch.empty(dim, taps))

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)

    def mix(self, u: Tensor, earlier: Iterable[Tensor]) -> Tensor:
        return F.silu(weighted(u, earlier, self.weight))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": self.placement}
