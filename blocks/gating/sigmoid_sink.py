from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import LinearGating, Routing
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative, Positive


@register("gating", "sigmoid_sink")
class SigmoidSink(LinearGating):
    """Sigmoid gate whose last experts are shared: every token has them, and they take weight from the chosen ones.

    Inkling (Thinking Machines 2026), as in transformers, with R = n_experts − n_shared routed experts and s = σ(W x):
    choose the k = top_k − n_shared highest s_i + b_i of i ≤ R; weights are s, divided by their sum over the chosen and
    the shared ones, times ``scaling`` and a learned number that starts at 1. So what a token does not want of any
    routed expert goes to the shared ones, as scores go to a sink. b is balanced as in ``sigmoid_bias``.

    Shared experts are the last of the stack: one network each, of a routed expert's width, where transformers stores
    them apart. Under expert parallelism they belong to the last rank, which every token then reaches. Balance losses
    and the bias see routed experts alone; the load counts all.

    Args:
        top_k: experts per token, the shared ones included; 8 in Inkling
        n_shared: shared experts; 2 in Inkling
        scaling: factor on the weights; 8 in Inkling
        bias_step: change of the bias per step
        balance: additional balance losses, one or a list; null for none
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"top_k": 6, "n_shared": 4, "bias_step": 1.0}

    bias: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        n_shared: Count = 1,
        scaling: Positive = 1.0,
        bias_step: NonNegative = 0.001,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        if n_shared >= top_k:
            rule = f"must leave some of the top_k ({top_k}) experts of a token to be chosen"
            raise BlockError("n_shared", n_shared, rule, "Raise top_k, which counts the shared ones too")
        self.n_routed, self.n_shared, self.scaling, self.bias_step = n_experts - n_shared, n_shared, scaling, bias_step
        self.gain = nn.Parameter(torch.empty(1))
        self.register_buffer("bias", torch.zeros(self.n_routed, dtype=torch.float32))

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        n = known["n_shared"]
        return {**super().child_context(child, known), "n_experts": known["n_experts"] - n, "top_k": known["top_k"] - n}

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.sigmoid()
        if experts is None:
            choice = probs[:, : self.n_routed].detach() + self.bias.to(probs.dtype)
            chosen = choice.topk(self.top_k - self.n_shared, sorted=False).indices
            shared = torch.arange(self.n_routed, self.n_experts, device=logits.device).expand(len(logits), -1)
            experts = torch.cat((chosen, shared), 1)
        logs = F.logsigmoid(logits.gather(1, experts))
        weights = (logs - logs.logsumexp(-1, keepdim=True)).exp()  # s over its sum, without a small divisor
        return experts, weights * self.scaling * self.gain.to(weights.dtype), probs

    def _losses(self, routing: Routing, logits: Tensor, length: int, real: Tensor | None) -> dict[str, Tensor]:
        R = self.n_routed
        chosen = routing.experts[:, : self.top_k - self.n_shared].clamp(max=R)  # R stands for none, as of padding
        return super()._losses(
            routing._replace(experts=chosen, probs=routing.probs[:, :R]), logits[:, :R], length, real
        )

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        routed = load[: self.n_routed]
        self.bias += self.bias_step * (routed.mean() - routed).sign()
