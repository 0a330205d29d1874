"""The contract of ``dropping``: drop tokens of overloaded experts, in training. A child of ``ffn/moe``."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.gating.base import Routing, rows
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Fraction, Positive


@family("dropping", context=("n_experts",))
class Dropping(Block):
    """Replaces entries of a routing by E, no expert, with weight 0."""

    # How many are dropped depends on the routing, and what is dropped is not computed.
    flops_within: ClassVar[float | None] = 0.1

    def drawn(self) -> Drawn:
        return Drawn(acts="training")

    def forward(self, routing: Routing, shape: tuple[int, int]) -> Routing:
        """A routing of ``shape`` (B, T) tokens → one with fewer pairs; unchanged in evaluation."""
        raise NotImplementedError


@register("dropping", "device_budget")
class DeviceBudget(Dropping):
    """Each device takes at most its budget of tokens; those with the lowest affinity are dropped. Training only.

    DeepSeek-V2, arXiv 2405.04434, §2.2.4: the budget of a device is ``capacity`` times the mean load,
    capacity · k T / D (token, expert) pairs over the batch; on each device the pairs with the lowest affinity are
    dropped until it is met; about a tenth of the sequences are exempt, so that evaluation, which drops nothing, stays
    familiar. Dropped pairs add nothing to a token's output; the remaining weights are unchanged.

    Exempt sequences are drawn for each batch, and count towards the budget first. Devices hold equal, contiguous ranges
    of experts. The budget is that of this process's tokens, without padding.

    Args:
        n_devices: D, devices that share the experts; 8 in V2
        capacity: budget over mean load; 1.0 in V2
        exempt: probability that a sequence is exempt; 0.1 in V2
    """

    causal: ClassVar[bool] = False  # in training, later tokens with higher affinity displace earlier ones

    def __init__(self, n_experts: int, n_devices: Count = 1, capacity: Positive = 1.0, exempt: Fraction = 0.1) -> None:
        super().__init__()
        if n_experts % n_devices:
            remedy = "Choose a divisor of the number of experts"
            raise BlockError("n_devices", n_devices, f"must divide n_experts ({n_experts})", remedy)
        self.n_experts, self.n_devices, self.capacity, self.exempt = n_experts, n_devices, capacity, exempt

    def forward(self, routing: Routing, shape: tuple[int, int]) -> Routing:
        if not self.training or routing.experts.is_meta:
            return routing
        draws = torch.rand(shape[0], dtype=torch.float32, device=routing.experts.device)
        whole = (draws < self.exempt).repeat_interleave(shape[1])
        kept = self.within_budget(routing, whole)
        experts = routing.experts.masked_fill(~kept, self.n_experts)
        return routing._replace(
            experts=experts, weights=routing.weights * kept, pairs=rows(experts, self.n_experts, routing.pairs)
        )

    def within_budget(self, routing: Routing, whole: Tensor) -> Tensor:
        """Which pairs to keep, [T,k]; ``whole`` [T] marks tokens that are never dropped."""
        experts, E = routing.experts, self.n_experts
        pairs = (experts < E).sum().double()  # by the default dtype, a product would round to a whole pair more or less
        budget = (pairs * self.capacity / self.n_devices).ceil()
        affinity = routing.probs.gather(1, experts.clamp(max=E - 1)).detach().masked_fill(whole[:, None], math.inf)
        affinity = affinity.masked_fill(experts == E, -math.inf).flatten()
        device = experts.flatten() // (E // self.n_devices)
        best_first = affinity.argsort(descending=True, stable=True)
        best_first = best_first[device[best_first].argsort(stable=True)]  # by device, then by affinity
        starts = torch.searchsorted(
            device[best_first].contiguous(), torch.arange(self.n_devices + 1, device=device.device)
        )
        rank = torch.empty_like(best_first)
        rank[best_first] = torch.arange(len(best_first), device=device.device) - starts[device[best_first]]
        return ((rank < budget).view_as(experts) | whole[:, None]) & (experts < E)
