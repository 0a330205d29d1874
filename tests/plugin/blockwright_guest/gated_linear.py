from torch.nn import functional as F

from blockwright.blocks.attention.base import even_heads
from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.linear import Linear
from blockwright.registry import register


@register("attention", "gated_linear")
class GatedLinear(Recurrent):
    """Gated linear attention: every channel of a key is forgotten at a rate of its own.

    Yang et al. 2023, arXiv 2312.06635: S ← Diag(σ(W_α x)^{1/16}) S + k vᵀ; y = W_o norm(Sᵀ q / √H), without its gate.
    """

    residual_outputs = ("output.weight",)

    def __init__(self, d_model: int, n_heads: int = 8) -> None:
        super().__init__()
        self.head_dim = even_heads(d_model, n_heads)
        self.query, self.key, self.value, self.rate, self.output = (Linear(d_model, d_model, False) for _ in range(5))

    def mix(self, x, given, held):
        q, k, v, f = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.query, self.key, self.value, self.rate))
        y, state = self.recurred(q * self.head_dim**-0.5, k, v, F.logsigmoid(f) / 16, None, given.segments, held)
        return self.output(F.rms_norm(y, (self.head_dim,), eps=0.01).flatten(2)), state

    def memory(self):
        return {"state": (self.value.out_features // self.head_dim, self.head_dim, self.head_dim)}

    def parallel_plan(self):
        return {**{f"{n}.weight": "column" for n in ("query", "key", "value", "rate")}, "output.weight": "row"}
