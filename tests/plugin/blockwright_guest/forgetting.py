from torch import nn

from blockwright.blocks.position.base import Position
from blockwright.registry import register


@register("position", "forgetting")
class Forgetting(Position):
    """A bias that falls with what the tokens in between make forget, at a rate of their own in each head.

    Lin et al. 2025 (Forgetting Transformer), arXiv 2503.02130: with f_u,n = σ(W x_u + b), score_n(t, s) +=
    Σ_{s < u ≤ t} ln f_u,n. Each token has its N logarithms remembered; the sums are made of those of the keys.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, n_heads)

    def slots(self):
        return {"fade": (self.gate.out_features,)}

    def remember(self, x, positions, declared):
        return (nn.functional.logsigmoid(self.gate(x)),)

    def bias(self, queries, keys):
        order = keys.order.argsort()
        since = keys.noted[0][:, order].float().cumsum(1)  # of the first key
        own = since[:, since.shape[1] - queries.q.shape[1] :]
        return own.mT[..., None] - since[:, order.argsort()].mT[:, :, None]

    def parallel_plan(self):
        return {"gate.weight": "column", "gate.bias": "column"}
