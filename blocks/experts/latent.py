from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("experts", "latent")
class Latent(Experts):
    """Experts that work in a latent narrower than the model: latent MoE.

    Elango et al. 2026 (Nemotron 3 Super and Ultra), arXiv 2601.18089: y = W_up Σ_k w_k expert_k(W_down x). The gate and
    shared experts see x itself. The experts' weights, and under expert parallelism what is sent of a token, are ℓ/D of
    those at full width, which pays for more experts and more choices.

    Kimi K3, arXiv 2607.24653, normalises the sum before W_up: ``up_norm``.

    ``W_up`` is not among ``residual_outputs``: depth-scaled initialisation shrinks the experts' own output already.

    Args:
        experts: those that work on the latent
        width: ℓ, of the latent; null is d_model / 4, as in Nemotron 3 Super
        up_norm: of the experts' sum, before W_up; null for none
    """

    def __init__(self, experts: Experts, d_model: int, width: Count | None = None, up_norm: Norm | None = None) -> None:
        super().__init__()
        self.experts, self.up_norm = experts, up_norm
        self.down = Linear(d_model, _width(d_model, width), bias=False)
        self.up = Linear(_width(d_model, width), d_model, bias=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        width = _width(known["d_model"], known["width"])
        return {"dim": width} if child == "up_norm" else {"d_model": width}

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        y = self.experts(self.down(x), routing)
        return self.up(y if self.up_norm is None else self.up_norm(y))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"down.weight": "replicate", "up.weight": "replicate"}


def _width(d_model: int, width: int | None) -> int:
    return width or max(1, d_model // 4)
