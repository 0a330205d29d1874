from typing import ClassVar

import torch
from torch import nn

from blockwright import Convolution, register


@register("convolution", "smear")
class Smear(Convolution):
    """Each token receives the token before it, as much as a gate of its first channels says.

    modded-nanogpt: u_t ← u_t + λ σ(g · u_t,1:n) u_{t−1}. λ and g are learned.

    Args:
        gated_by: n, channels that the gate reads
    """

    weight_kinds: ClassVar[dict] = {"gate": "matrix"}

    def __init__(self, dim: int, gated_by: int = 12) -> None:
        super().__init__(dim, past=1)
        self.gate, self.strength = nn.Parameter(torch.empty(1, min(gated_by, dim))), nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.strength.fill_(0.1)

    def mix(self, u, earlier):
        (before,) = earlier
        return u + self.strength * (u[..., : self.gate.shape[1]] @ self.gate.t()).sigmoid() * before

    def parallel_plan(self):
        return {"gate": "replicate", "strength": "replicate"}
