from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Kind
from blockwright.blocks.gating.hash import Hash
from blockwright.blocks.precision import full_linear
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


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
