from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blockwright.blocks.balance.base import Balance, check_devices, choices, shares
from blockwright.registry import register
from blockwright.registry.ranges import Count, NonNegative


@register("balance", "device")
class DeviceBalance(Balance):
    """Device-level balance loss of each sequence: balances the load of the devices that hold the experts.

    DeepSeek-V2, arXiv 2405.04434, eq. 26: loss = α Σ_d f'_d P'_d; f'_d = mean_{i on d} f_i, of the experts of device d;
    P'_d = Σ_{i on d} P_i; f and P as in ``expert``. Devices hold equal, contiguous ranges of experts. A device here
    is a group of experts in the formula, whatever the run is distributed over. Perfectly even routing gives α.

    The released V2 code has no such loss; this is the paper's formula.

    Args:
        n_devices: D, devices that share the experts; 8 in V2
        alpha: weight of the loss; 0.05 in V2
    """

    splits: ClassVar[bool] = True

    def __init__(self, n_experts: int, top_k: int, n_devices: Count = 8, alpha: NonNegative = 0.05) -> None:
        super().__init__()
        check_devices(n_experts, n_devices)
        self.n_experts, self.top_k, self.n_devices, self.alpha = n_experts, top_k, n_devices, alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        counts = choices(experts, probs).unflatten(-1, (self.n_devices, -1)).mean(-1)
        p = shares(probs).unflatten(-1, (self.n_devices, -1)).sum(-1)
        factor = self.alpha * self.n_experts / self.top_k
        return {"device_balance": factor * self.over_sequences(counts, p, real)}
