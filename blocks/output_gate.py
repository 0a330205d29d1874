"""The contract of ``output_gate``: gate the heads' outputs before the output projection. A child of attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.base import Block, Drawn, Placement
from blockwright.blocks.linear import Linear
from blockwright.registry import family, register
from blockwright.registry.ranges import Count


@family("output_gate", context=("n_heads", "head_dim"))
class OutputGate(Block):
    """``head_dim`` is the width of a head's value."""

    def drawn(self) -> Drawn:
        return Drawn(acts="output")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The attention's input x [B,T,D] and its heads' outputs y [B,T,N,H] → [B,T,N,H]."""
        raise NotImplementedError


@register("output_gate", "elementwise")
class Elementwise(OutputGate):
    """A sigmoid gate for every element of every head.

    Qiu et al. 2025, arXiv 2505.06708: y ← σ(W x) ⊙ y, W of N·H rows.
    """

    def __init__(self, d_model: int, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.project = Linear(d_model, n_heads * head_dim, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.project(x).sigmoid().view_as(y)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"project.weight": "column"}


@register("output_gate", "hybrid")
class Hybrid(OutputGate):
    """A sigmoid gate for every element, from the attention's input and from what all its heads have found.

    Zhou et al. 2026 (Hybrid Gated Attention), arXiv 2608.11805, as in x-transformers:
    y ← σ(U_x silu(V_x x) + U_h silu(V_h vec(y))) ⊙ y. There U_x and U_h begin at 0 and so all gates at 1/2; here they
    are drawn, as those of other gates. Each gate needs all heads: ranks of a tensor group do not split the attention.

    Args:
        rank: width of V_x x and of V_h vec(y); null is the head width
    """

    def __init__(self, d_model: int, n_heads: int, head_dim: int, rank: Count | None = None) -> None:
        super().__init__()
        width, rank = n_heads * head_dim, rank or head_dim
        self.down, self.up = Linear(d_model, rank, bias=False), Linear(rank, width, bias=False)
        self.down_heads, self.up_heads = Linear(width, rank, bias=False), Linear(rank, width, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.up(F.silu(self.down(x))) + self.up_heads(F.silu(self.down_heads(y.flatten(-2))))
        return y * logits.sigmoid().view_as(y)


@register("output_gate", "low_rank")
class LowRank(OutputGate):
    """A sigmoid gate for every element of every head, from a projection of low rank.

    Kimi Linear, arXiv 2510.26692: y ← σ(W_up W_down x) ⊙ y.

    Args:
        rank: width of W_down x; null is the head width, as in Kimi-Linear
    """

    def __init__(self, d_model: int, n_heads: int, head_dim: int, rank: Count | None = None) -> None:
        super().__init__()
        self.down = Linear(d_model, rank or head_dim, bias=False)
        self.up = Linear(rank or head_dim, n_heads * head_dim, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.up(self.down(x)).sigmoid().view_as(y)

    def parallel_plan(self) -> dict[str, Placement]:
        return {"up.weight": "column"}


@register("output_gate", "per_head")
class PerHead(OutputGate):
    """One sigmoid gate for each head.

    Qiu et al. 2025, arXiv 2505.06708, headwise: y_n ← σ(w_n · x) y_n, W of N rows.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.project = Linear(d_model, n_heads, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.project(x).sigmoid()[..., None]

    def parallel_plan(self) -> dict[str, Placement]:
        return {"project.weight": "column"}


@register("output_gate", "silu")
class SiLU(Elementwise):
    """A SiLU gate for every element of every head: unlike a sigmoid's, it is unbounded and may change signs.

    Gated DeltaNet, arXiv 2412.06464; Qwen3-Next: y ← silu(W x) ⊙ y, W of N·H rows.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * F.silu(self.project(x)).view_as(y)


@register("output_gate", "softplus")
class Softplus(PerHead):
    """One softplus gate for each head, which may also amplify it.

    Laguna: y_n ← softplus(w_n · x) y_n, W of N rows.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * F.softplus(self.project(x))[..., None]
