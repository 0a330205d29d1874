from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Kind
from blockwright.blocks.gating.base import Gating, Routing, routed
from blockwright.blocks.precision import full_linear
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive


@register("gating", "hash")
class Hash(Gating):
    """Experts by token id: a fixed random table, nothing learned.

    Roller et al. 2021 (Hash Layers), arXiv 2106.04426: token v goes to the k experts in row v of a table drawn once,
    each with weight 1/k. This is the paper's random hash; its balanced one assigns experts by token frequency, which a
    model does not know. It is the baseline "Hash Layer" of DeepSeekMoE's paper.

    Args:
        top_k: k, experts per token
    """

    by_id = True
    decides = None
    table: Tensor

    def __init__(self, n_experts: int, vocab_size: int, top_k: Count = 1) -> None:
        super().__init__(n_experts, top_k)
        self.register_buffer("table", torch.zeros(vocab_size, top_k, dtype=torch.long))

    def reset_parameters(self) -> None:
        self.table.copy_(torch.rand(len(self.table), self.n_experts, dtype=torch.float32).topk(self.top_k).indices)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor | None = None,
        experts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Routing:
        if tokens is None:
            rule = "routes by the tokens' ids, which this caller does not pass"
            raise BlockError("gating", "hash", rule, "Call the ffn with tokens, as the decoder does")
        experts = self.table[tokens.flatten()]
        weights, probs = self.weigh(x, experts)
        return routed(experts, weights, probs, real)

    def weigh(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B,T,D] or [T,D] and their experts [T,k] → weights [T,k] and affinities [T,E], fp32."""
        weights = torch.full(experts.shape, 1 / self.top_k, dtype=torch.float32, device=x.device)
        return weights, weights.new_zeros(len(experts), self.n_experts).scatter_add(1, experts, weights)


@register("gating", "hash_softplus")
class HashSoftplus(Hash):
    """Experts by token id as in ``hash``, with learned weights: √softplus(W x) at the table's experts.

    DeepSeek-V4's first layers: the weights are divided by their sum, times ``scaling``. Only which experts a token goes
    to is fixed. The router computes in fp32 whatever the model's precision.

    Args:
        top_k: k, experts per token
        scaling: factor on the weights
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}

    def __init__(
        self, d_model: int, n_experts: int, vocab_size: int, top_k: Count = 2, scaling: Positive = 1.0
    ) -> None:
        super().__init__(n_experts, vocab_size, top_k)
        self.scaling, self.weight = scaling, nn.Parameter(torch.empty(n_experts, d_model))

    def weigh(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        device = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        with torch.autocast(device, enabled=False):
            probs = F.softplus(full_linear(x.flatten(0, -2).float(), self.weight.float())).sqrt()
        weights = probs.gather(1, experts)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling, probs
