from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.balance.base import Balance, check_devices, shares
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative


@register("balance", "communication")
class CommunicationBalance(Balance):
    """Communication balance loss of each sequence: balances how many tokens each device receives.

    DeepSeek-V2, arXiv 2405.04434, eq. 29: loss = α Σ_d f''_d P''_d; f''_d = D n_d / (M T), where n_d tokens were sent
    to device d; P''_d = Σ_{i on d} P_i, the sum of its experts'. A token with several experts on one device is sent
    there once. Devices hold equal, contiguous ranges of experts. Use it with ``group_limited`` gating of as many
    groups, whose ``top_groups`` is M: then every token reaches at most M devices.

    The released V2 code has no such loss; this is the paper's formula.

    Args:
        n_devices: D, devices that share the experts; 8 in V2
        top_devices: M, devices a token may reach; 3 in V2
        alpha: weight of the loss; 0.02 in V2
    """

    splits: ClassVar[bool] = True

    def __init__(
        self, n_experts: int, top_k: int, n_devices: Count = 8, top_devices: Count = 3, alpha: NonNegative = 0.02
    ) -> None:
        super().__init__()
        check_devices(n_experts, n_devices)
        if not 1 <= top_devices <= n_devices:
            rule = f"must lie between 1 and n_devices ({n_devices})"
            raise BlockError("top_devices", top_devices, rule, "Use the gate's top_groups")
        self.n_devices, self.top_devices, self.alpha = n_devices, top_devices, alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        device_of = experts // (probs.shape[-1] // self.n_devices)  # E, no expert, becomes D, no device
        reached = torch.zeros(*experts.shape[:2], self.n_devices + 1, dtype=probs.dtype, device=probs.device)
        reached = reached.scatter(-1, device_of, 1.0)[..., : self.n_devices]
        p = shares(probs).unflatten(-1, (self.n_devices, -1)).sum(-1)
        factor = self.alpha * self.n_devices / self.top_devices
        return {"communication_balance": factor * self.over_sequences(reached.sum(1), p, real)}
