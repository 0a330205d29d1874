from torch.nn import functional as F

from blockwright import register
from blockwright.blocks.attention.base import even_heads
from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.linear import Linear


@register("attention", "gated_linear")
class GatedLinear(Recurrent):
    """Gated linear attention: every channel of a key forgets at a rate of its own (Yang et al. 2023, arXiv 2312.06635).

    S ← Diag(σ(W_α x)^{1/16}) S + k vᵀ; y = W_o (silu(W_z x) ⊙ norm(Sᵀ q / √H)).

    Args:
        n_heads: N, heads
    """

    residual_outputs = ("output.weight",)
    conformance_settings = {"n_heads": 4}

    def __init__(self, d_model: int, n_heads: int = 8) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, even_heads(d_model, n_heads)
        for name in ("query", "key", "value", "forget", "gate", "output"):
            self.add_module(name, Linear(d_model, d_model, bias=False))

    def mix(self, x, given, held):
        q, k, v, f = (
            self.get_submodule(n)(x).unflatten(-1, (-1, self.head_dim)) for n in ("query", "key", "value", "forget")
        )
        y, state = self.recurred(
            q * self.head_dim**-0.5, k, v, F.logsigmoid(f.float()) / 16, None, given.segments, held
        )
        return self.output(F.rms_norm(y, (self.head_dim,), eps=0.01).flatten(2) * F.silu(self.gate(x))), state

    def memory(self):
        return {"state": (self.value.out_features // self.head_dim, self.head_dim, self.head_dim)}

    def parallel_plan(self):
        return {
            **{f"{n}.weight": "column" for n in ("query", "key", "value", "forget", "gate")},
            "output.weight": "row",
        }
