from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.linear import Linear
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("experts", "latent")
class Latent(Experts):
    """Experts that work in a latent narrower than the model: latent MoE.

    Elango et al. 2026 (Nemotron 3 Super and Ultra), arXiv 2601.18089: y = W_up Σ_k w_k expert_k(W_down x). The gate and
    shared experts see x itself. The experts' weights, and under expert parallelism what is sent of a token, are ℓ/D of
    those at full width, which pays for more experts and more choices.

    ``W_up`` is not among ``residual_outputs``: depth-scaled initialisation shrinks the experts' own output already.

    Args:
        experts: those that work on the latent
        width: ℓ, of the latent; null is d_model / 4, as in Nemotron 3 Super
    """

    def __init__(self, experts: Experts, d_model: int, width: Count | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.down = Linear(d_model, _width(d_model, width), bias=False)
        self.up = Linear(_width(d_model, width), d_model, bias=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"d_model": _width(known["d_model"], known["width"])}

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return self.up(self.experts(self.down(x), routing))

    def parallel_plan(self) -> dict[str, Placement]:
        return {"down.weight": "replicate", "up.weight": "replicate"}


def _width(d_model: int, width: int | None) -> int:
    return width or max(1, d_model // 4)
