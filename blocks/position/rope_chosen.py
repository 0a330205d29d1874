from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blockwright.blocks.kernels.elementwise import base_frequencies
from blockwright.blocks.position.rope import RoPE
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive


@register("position", "rope_chosen")
class RoPEChosen(RoPE):
    """Rotary positions whose frequencies are picked from those of another head, a list that is stored with the weights.

    The rotated part of MLA has R/2 pairs; a model whose heads turned H/2 pairs has more, and each layer keeps its most
    important ones, in any number of copies (TransMLA, arXiv 2502.07864, and MHA2MLA, arXiv 2502.14837, choose by norms
    too). Pair i rotates by t · theta^(−2 j_i / H), with j [R/2] a buffer that is set with derived weights. In a new
    model they are spread evenly over the H/2. Here they are part of the checkpoint, and differ by layer.

    Args:
        theta: base of the frequencies
        of_dim: H, width of the head whose frequencies are picked from; null is the rotated width, then all are used
        pairing: which dimensions form a pair
    """

    chosen: Tensor

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        of_dim: Count | None = None,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__(head_dim, theta, pairing=pairing)
        self.of_dim = of_dim or head_dim
        if self.of_dim % 2:
            raise BlockError("of_dim", of_dim, "is the width of a head of pairs, so it is even", "Write an even number")
        self.register_buffer("chosen", torch.zeros(head_dim // 2, dtype=torch.int64))

    def reset_parameters(self) -> None:
        number = len(self.chosen)
        self.chosen.copy_(torch.arange(number) * (self.of_dim // 2) // number)

    def frequencies(self, device: torch.device) -> Tensor:
        return base_frequencies(self.theta, self.of_dim, device)[self.chosen.to(device)]
