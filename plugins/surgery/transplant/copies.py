from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from blockwright.blocks.ffn import MoE, SwiGLU
from blockwright.plugins.surgery.transplant.base import Setting, Transplanted
from blockwright.plugins.surgery.transplant.upcycle import Upcycle, stacked, sum_of_weights, width
from blockwright.registry import register


@register("transplant", "copies")
class Copies(Upcycle):
    """Every expert is a copy of the dense block, and the router is drawn.

    Komatsuzaki et al. 2022 (sparse upcycling), arXiv 2212.05055. Exact if the weights of a token's experts always have
    the same sum s, by which the outputs are divided: 1 for ``topk_softmax``, ``scaling`` for a renormalised gate.
    Copies part slowly; ``drop`` makes them differ from the start.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {"name": "moe", "n_experts": 4},
            "experts": {"name": "swiglu", "d_ff": 48},
            "gating": {"name": "topk_softmax", "top_k": 2},
        },
    )

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        return new.shared is None and width(new.experts) == old.down.in_features

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, SwiGLU) and isinstance(new, MoE)
        tensors = stacked(old, len(new.experts.down))  # type: ignore[arg-type]
        total, same = sum_of_weights(new.gating, old.down.out_features, setting.seed)
        tensors["experts.down"] /= total
        note = f"weights of a token's experts add up to {total:.3g}" + ("" if same else " on average, not always")
        return Transplanted(tensors, frozenset(tensors), same, f"{note}; router drawn")
