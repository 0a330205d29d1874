from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blocks.balance.base import Balance
from blocks.gating.base import Gating, check_groups, keep_groups
from registry import register


@register("gating", "sigmoid_bias")
class SigmoidBias(Gating):
    """Sigmoid gate balanced by a bias on the choice instead of by a loss.

    DeepSeek-V3, arXiv 2412.19437, §2.1.2; Wang et al. 2024, arXiv 2408.15664: s = sigmoid(W x); choose by s + b (within
    the best groups: a group's score is the sum of its two highest s + b); weights are s at the chosen experts, without
    the bias, divided by their sum, times ``scaling``. After each optimizer step b_i −= γ if expert i got more than the
    mean load, b_i += γ if less.

    The bias is a buffer: it has no gradient, and moves once a step over all micro-batches. Experts outside the kept
    groups are masked with −inf, as in DeepSeek's inference code; its Hugging Face code masks with 0 and may choose
    them when biased scores are negative.

    Args:
        top_k: k, experts a token
        n_groups: groups of equal size, neighbours in the expert index; 1 switches the group limit off
        top_groups: groups a token may reach
        renormalise: whether the chosen weights are divided by their sum
        scaling: factor on the weights; 2.5 in V3
        bias_step: γ, how far the bias moves a step; 0.001 in V3
        balance: loss that evens out the load besides; null for none
    """

    bias: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 2,
        n_groups: int = 1,
        top_groups: int = 1,
        renormalise: bool = True,
        scaling: float = 1.0,
        bias_step: float = 0.001,
        balance: Balance | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        check_groups(n_experts, n_groups, top_groups, top_k)
        self.n_groups, self.top_groups = n_groups, top_groups
        self.renormalise, self.scaling, self.bias_step = renormalise, scaling, bias_step
        self.register_buffer("bias", torch.zeros(n_experts))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.sigmoid()
        choice = probs.detach() + self.bias.to(probs.dtype)
        best_two = min(2, self.n_experts // self.n_groups)
        group_scores = choice.unflatten(-1, (self.n_groups, -1)).topk(best_two).values.sum(-1)
        experts = keep_groups(choice, group_scores, self.top_groups).topk(self.top_k).indices
        weights = probs.gather(1, experts)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling, probs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidBias:
        """Moves the bias with the module, but never rounds it: beside a bias in bf16 its steps would vanish."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        self.bias += self.bias_step * (load.mean() - load).sign()
