from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockwright.blocks.drawn import Drawn
from blockwright.blocks.dropping.base import Dropping
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("ffn", "moe")
class MoE(FFN):
    """Mixture of experts: routed experts, and shared ones applied to every token.

    Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066: y = shared(x) + Σ_{i chosen} g_i expert_i(x). Shared experts are
    one network of their total width, which computes the same as several; their output is added ungated.

    Args:
        n_experts: E, routed experts
        gating: chooses experts for each token
        experts: the routed experts
        shared: a dense ffn for every token, e.g. ``{name: swiglu, d_ff: 2816}`` for two of width 1408; null for none
        dropping: drops tokens of overloaded experts in training; null for none
        expert_norm: norm of what the routed experts read, and neither the gate nor the shared ones, as in Gemma 4; null
            for none
    """

    def __init__(
        self,
        gating: Gating,
        experts: Experts,
        n_experts: Count = 8,
        shared: FFN | None = None,
        dropping: Dropping | None = None,
        expert_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.gating, self.experts, self.shared, self.dropping = gating, experts, shared, dropping
        self.expert_norm = expert_norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = super().child_context(child, known)
        return {**inner, "dim": known["d_model"]} if child == "expert_norm" else inner

    def drawn(self) -> Drawn:
        return Drawn(hides=("n_experts",))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing]:
        known = {} if given is None else {"experts": given.experts, "real": given.real}
        known = {name: value for name, value in known.items() if value is not None}  # a plug-in's gate need not take it
        routing = self.gating(x, None if given is None else given.tokens, **known)
        if self.dropping is not None:
            routing = self.dropping(routing, x.shape[:2])
        h = x if self.expert_norm is None else self.expert_norm(x)
        y = self.experts(h.flatten(0, 1), routing).view_as(x)
        return (y if self.shared is None else y + self.shared(x, given)[0]), routing
