from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.mixing.base import APART, Mixing
from blockwright.registry import register
from blockwright.registry.ranges import Count, Positive


@register("mixing", "sinkhorn")
class Sinkhorn(Mixing):
    """A positive matrix whose columns and rows are divided by their sums in turn, until it is nearly doubly stochastic.

    mHC, arXiv 2512.24880; Sinkhorn & Knopp 1967: A = softmax(c) + ε by rows; columns, then (rows, columns) n − 1 times:
    A ← A / (ΣA + ε); X ← Aᵀ X. Rows keep an error, of 1e-6 for logits of deviation 1, of 0.08 for 10. Order,
    transposition and ε are those of DeepSeek-V4's code in transformers. It begins near the identity.

    Args:
        iterations: n, divisions by the sums of columns
        eps: ε, added to each number and each sum
    """

    def __init__(self, n_streams: int, iterations: Count = 20, eps: Positive = 1e-6) -> None:
        super().__init__()
        self.n_streams, self.n_logits = n_streams, n_streams**2
        self.iterations, self.eps = iterations, eps

    def start(self) -> Tensor:
        return (APART * (1 - torch.eye(self.n_streams, dtype=torch.float32))).flatten()

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        matrix = logits.unflatten(-1, (self.n_streams, -1)).softmax(-1) + self.eps
        for dim in (-2, *(-1, -2) * (self.iterations - 1)):
            matrix = matrix / (matrix.sum(dim, keepdim=True) + self.eps)
        return matrix.mT.to(x.dtype) @ x
