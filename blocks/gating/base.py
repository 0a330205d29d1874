"""The contract of ``gating``: choose experts for each token, and say how evenly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from blocks.balance.base import Balance
from blocks.base import Block
from registry import BlockError, family


class Routing(NamedTuple):
    """Where tokens go. T counts all tokens of the batch.

    experts: [T,k] int64, the chosen experts of each token
    weights: [T,k] fp32, what each chosen expert's output is multiplied by; gradients flow to the router through it
    probs: [T,E] fp32, the affinities before any selection bias or group mask
    losses: name → scalar, already weighted, to be added to the training loss
    load: [E] fp32, tokens that chose each expert (no gradient)
    """

    experts: Tensor
    weights: Tensor
    probs: Tensor
    losses: dict[str, Tensor]
    load: Tensor


@family("gating", context=("n_experts",))
class Gating(Block):
    """Routes tokens. Subclasses turn logits into ``choose``; router arithmetic is fp32 whatever the model's precision.

    State that changes between steps is a buffer, moved by ``update`` once an optimizer step, never in ``forward``,
    which activation checkpointing may run twice.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, balance: Balance | None) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            rule = f"a token goes to between 1 and n_experts ({n_experts}) experts"
            raise BlockError("top_k", top_k, rule, "Lower top_k, or give the ffn more experts (model.ffn.n_experts)")
        self.n_experts, self.top_k, self.balance = n_experts, top_k, balance
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T,E] → experts [T,k], weights [T,k], affinities [T,E]; fp32 in, fp32 out."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Routing:
        """x [B,T,D], or [T,D] for one sequence → a routing of all its tokens, in order.

        Sequences are told apart because some balance losses are means over sequences.
        """
        device = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        with torch.autocast(device, enabled=False):
            logits = x.flatten(0, -2).float() @ self.weight.float().t()
            experts, weights, probs = self.choose(logits)
        load = torch.zeros(self.n_experts, device=x.device).scatter_add_(
            0, experts.flatten(), torch.ones(experts.numel(), device=x.device)
        )
        losses: dict[str, Tensor] = {}
        if self.balance is not None:
            T = x.shape[-2]
            losses = self.balance(probs.unflatten(0, (-1, T)), experts.unflatten(0, (-1, T)))
        return Routing(experts, weights, probs, losses, load)

    def update(self, load: Tensor) -> None:
        """Called once an optimizer step with the tokens each expert got in all of its batches, [E]."""


def keep_groups(scores: Tensor, group_scores: Tensor, top_groups: int) -> Tensor:
    """Scores [T,E] with −inf outside the ``top_groups`` groups of highest group_scores [T,G]; groups are contiguous."""
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept = kept.scatter(1, group_scores.topk(top_groups, sorted=False).indices, True)
    each = scores.shape[1] // group_scores.shape[1]
    return scores.masked_fill(~kept.repeat_interleave(each, 1), float("-inf"))


def check_groups(n_experts: int, n_groups: int, top_groups: int, top_k: int) -> None:
    """Refuse groups that do not divide the experts, or that leave a token fewer than top_k to choose from.

    Raises:
        BlockError
    """
    if n_groups < 1 or n_experts % n_groups:
        remedy = "Choose a divisor of the number of experts"
        raise BlockError("n_groups", n_groups, f"must divide n_experts ({n_experts})", remedy)
    if not 1 <= top_groups <= n_groups:
        raise BlockError("top_groups", top_groups, f"must lie between 1 and n_groups ({n_groups})", "Lower top_groups")
    if top_k > top_groups * (n_experts // n_groups):
        rule = f"the {top_groups} kept groups hold {top_groups * (n_experts // n_groups)} experts"
        raise BlockError("top_k", top_k, rule, "Lower top_k, or keep more groups (top_groups)")
