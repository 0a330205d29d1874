"""The contract of ``mixing``: how residual streams exchange what they hold. A child of ``residual``."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Positive


@family("mixing", context=("n_streams",))
class Mixing(Block):
    """Turns logits of each token into a matrix [M,M], and multiplies the streams by it. Context: ``n_streams``, M.

    Attributes:
        n_logits: L, logits that a token gives
    """

    n_logits: int

    def start(self) -> Tensor:
        """Logits [L] at which streams stay nearly apart."""
        raise NotImplementedError

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Streams [B,T,M,D] and fp32 logits [B,T,L] → streams [B,T,M,D]."""
        raise NotImplementedError


APART = -8.0  # a logit of what leaves its stream, beside 0 for what stays: e⁻⁸ is 0.03 %


@register("mixing", "none")
class NoMixing(Mixing):
    """Streams stay apart: they are read together, and written to, as in Hunyuan-4."""

    n_logits = 0

    def __init__(self) -> None:
        super().__init__()

    def start(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return x


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
