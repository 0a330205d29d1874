"""The contract of ``readout``: what becomes of each head's sum over values. A child of attention by scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.base import Block, Drawn, Placement
from blockwright.blocks.linear import Linear
from blockwright.registry import BlockError, family, register


@family("readout", context=("n_heads", "n_kv_heads", "head_dim"))
class Readout(Block):
    """It sees the sums, the values of the token itself and the attention's input. ``output_gate`` follows it.

    ``head_dim`` is the width of a head's value. An attention takes one by ``Changes`` (blocks/attention/scored.py), and
    has ``heads(n_heads)`` heads left for its output projection.
    """

    def drawn(self) -> Drawn:
        return Drawn(acts="output")

    def heads(self, n_heads: int) -> int:
        """Heads that are left of N; by default all."""
        return n_heads

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Sums over values y [B,T,N,V] → [B,T,heads(N),V].

        Args:
            v: the token's own values, [B,T,K,V]; head n of y sums values of head ⌊n K/N⌋
            x: [B,T,D], which the attention reads
        """
        raise NotImplementedError


@register("readout", "difference")
class Difference(Readout):
    """Differential attention, second version: the difference of two heads that share their keys and values.

    Ye et al. 2026 (DIFF V2, microsoft/unilm): y_n ← y_2n − σ(w_n · x) y_2n+1, N/2 heads from N. There is no norm
    of the difference, and λ = σ(w · x) is that of a token. For as many heads as without it, N is doubled, which neither
    the output projection nor the cache grows with. The first version is ``attention=differential``: its values are as
    wide as two heads.

    Raises:
        BlockError: two neighbouring heads do not share their keys and values
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        if n_heads % (2 * n_kv_heads):
            rule = f"subtracts neighbouring heads of the same keys and values: 2 × {n_kv_heads} must divide n_heads"
            raise BlockError("n_heads", n_heads, rule, f"Use n_kv_heads=1, or n_heads={2 * n_heads} (gqa, mqa)")
        self.share = Linear(d_model, n_heads // 2, bias=False)

    def heads(self, n_heads: int) -> int:
        return n_heads // 2

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        one, other = y.unflatten(2, (-1, 2)).unbind(3)
        return one - self.share(x).sigmoid()[..., None] * other

    def parallel_plan(self) -> dict[str, Placement]:
        return {"share.weight": "column"}


@register("readout", "exclusive")
class Exclusive(Readout):
    """Exclusive self-attention: a head's output without what it says of the token itself.

    XSA, arXiv 2603.09078: y_t ← y_t − (y_t·v̂_t) v̂_t with v̂ = v / ‖v‖, head by head. No parameters.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        own = F.normalize(v, dim=-1).repeat_interleave(y.shape[2] // v.shape[2], 2)
        return y - (y * own).sum(-1, keepdim=True) * own
