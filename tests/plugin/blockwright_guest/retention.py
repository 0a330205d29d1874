import torch
from torch import nn
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention, even_heads
from blockwright.blocks.position.base import Position
from blockwright.registry import register
from blockwright.registry.ranges import Positive


@register("attention", "retention")
class Retention(Attention):
    """Attention without a softmax: what lies back fades, at a rate of its own in each head.

    Sun et al. 2023 (RetNet), arXiv 2307.08621, eq. 5 in its parallel form, with γ_n = 1 − 2^(−first_decay − n):
    y_t = W_o [norm(Σ_{s ≤ t} γ_n^(t−s) (q_t·k_s/√H) v_s)]_n. The paper's output gate is left out.

    Args:
        n_heads: N, heads
        first_decay: the first head forgets 2^−first_decay of its past a token
        position: turns queries and keys
    """

    residual_outputs = ("output.weight",)

    def __init__(self, d_model: int, position: Position, n_heads: int = 8, first_decay: Positive = 5.0) -> None:
        super().__init__()
        self.head_dim, self.n_heads, self.first_decay = even_heads(d_model, n_heads), n_heads, first_decay
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.position = position

    def parallel_plan(self):
        return {**{f"{name}.weight": "column" for name in ("query", "key", "value")}, "output.weight": "row"}

    def forward(self, x, given):
        positions, segments = given.positions, given.segments
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = self.position.rotate(q, k, positions)
        lag = (positions[:, :, None] - positions[:, None, :])[:, None].float()  # [B|1,1,T,T]
        heads = torch.arange(self.n_heads, device=x.device)[:, None, None]
        fading = (1 - 2.0 ** (-self.first_decay - heads)) ** lag.clamp(min=0) * (lag >= 0)
        if segments is not None:
            fading = fading * (segments[:, None, :, None] == segments[:, None, None, :])
        scores = torch.einsum("btnh,bsnh->bnts", q, k) * self.head_dim**-0.5 * fading.to(x.dtype)
        y = torch.einsum("bnts,bsnh->btnh", scores, v)
        return self.output(F.rms_norm(y, (self.head_dim,)).flatten(-2))
