from __future__ import annotations

from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.linear import Linear
from blockwright.blocks.readout.base import Readout
from blockwright.registry import BlockError, register


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
