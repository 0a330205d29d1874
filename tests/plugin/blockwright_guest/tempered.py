from torch import nn

from blockwright.blocks.scores import Scores
from blockwright.registry import register


@register("scores", "tempered")
class Tempered(Scores):
    """Scores as sharp as each query asks for, and each key grants.

    Zhang et al. 2024 (selective self-attention), arXiv 2411.12892, in which a token's own temperature scales its query:
    score_n(t, s) · (1 + tanh(W_q x_t)_n) · (1 + tanh(W_k x_s)_n). The paper's is of queries and values, with a further
    term of the position.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.of_query, self.of_key = (nn.Linear(d_model, n_heads, bias=False) for _ in range(2))

    def slots(self):
        return {"sharp": (self.of_key.out_features,)}

    def remember(self, x, positions, declared):
        return (self.of_key(x).tanh(),)

    def neutral(self):
        return {f"{side}.weight": self.of_query.weight * 0 for side in ("of_query", "of_key")}

    def forward(self, q, k, v, scoring, x, noted):
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        sharp = 1 + self.of_query(x).tanh(), 1 + noted[0]
        return self.kernels.attend(q * sharp[0][..., None], k * sharp[1][..., None].to(k.dtype), v, scoring)

    def parallel_plan(self):
        return {"of_query.weight": "column", "of_key.weight": "column"}
