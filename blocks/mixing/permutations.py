from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from blockwright.blocks.mixing.base import APART, Mixing
from blockwright.registry import BlockError, register

MOST = 6  # streams: 720 logits


@register("mixing", "permutations")
class Permutations(Mixing):
    """A convex combination of all M! permutations of the streams: exactly doubly stochastic.

    mHC-lite, arXiv 2601.05732, by the theorem of Birkhoff and von Neumann, which says that there is no other doubly
    stochastic matrix: X ← Σ_p softmax(c)_p P_p X. Sums of rows and columns are 1 up to rounding, where ``sinkhorn``
    comes near. It begins near the identity.

    Raises:
        BlockError: more than 6 streams, which have too many permutations
    """

    table: Tensor

    def __init__(self, n_streams: int) -> None:
        super().__init__()
        if n_streams > MOST:
            rule = f"have {math.factorial(n_streams):,} permutations, a logit for each"
            raise BlockError("n_streams", n_streams, rule, f"Use up to {MOST}, or mixing: sinkhorn")
        self.n_streams, self.n_logits = n_streams, math.factorial(n_streams)
        self.register_buffer("table", torch.zeros(self.n_logits, n_streams**2, dtype=torch.float32))

    def reset_parameters(self) -> None:
        every = list(itertools.permutations(range(self.n_streams)))  # the first one moves nothing
        order = torch.tensor(every, dtype=torch.int64)
        self.table.copy_(torch.nn.functional.one_hot(order, self.n_streams).flatten(1))

    def start(self) -> Tensor:
        return torch.tensor([0.0, *[APART] * (self.n_logits - 1)], dtype=torch.float32)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        matrix = logits.softmax(-1) @ self.table.to(logits.dtype)
        return matrix.unflatten(-1, (self.n_streams, -1)).to(x.dtype) @ x
