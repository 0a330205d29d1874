from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.base import Drawn, Placement
from blockwright.blocks.cache.state import State
from blockwright.blocks.decay import draw_time_steps
from blockwright.blocks.depthwise import CausalConv
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative, Positive, Taps

CONVOLVED = ("value", "key", "query")


@register("attention", "mamba2")
class Mamba2(Recurrent):
    """Mamba-2: a state space model with one decay a head, as a linear recurrence.

    Dao & Gu 2024, arXiv 2405.21060. With v, k, q = silu(conv(W x)) (x, B, C in the paper) and Δ = softplus(W_Δ x + b):
    S ← e^{−Δ exp(a)} S + k (Δ v)ᵀ; y = Sᵀ q + d v; output W_o (norm(y ⊙ silu(W_z x))), with the norm after the gate
    and over each group of heads by itself. Keys and queries are shared by the heads of a group. The released code
    fuses the projections and the convolutions; here they are apart, so that groups can be split over ranks. At the
    start exp(a) = 1 … N, d = 1, and softplus(b) is log-uniform in [0.001, 0.1]. The cache holds N·S·P fp32 numbers and
    the convolutions' last inputs, whatever the length.

    Args:
        n_heads: N, heads
        head_dim: P, width of a head; null is 2 d_model / n_heads, the paper's expansion
        state_dim: width of keys and queries; 128 in the paper's models
        n_groups: sets of keys and queries; divides n_heads
        taps: tokens that the convolutions see, the current one included
        least_step: lower bound of Δ; 0.001 in Nemotron-H
        eps: of the norm
    """

    # eps as in gated_delta
    conformance_settings: ClassVar[dict[str, object]] = {"state_dim": 6, "eps": 0.01, "least_step": 0.01}

    def __init__(
        self,
        d_model: int,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        state_dim: Count = 128,
        n_groups: Count = 1,
        taps: Taps = 4,
        least_step: NonNegative = 0.0,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        if n_heads % n_groups:
            raise BlockError("n_groups", n_groups, f"must divide n_heads ({n_heads})", "Use 1 for one group")
        self.head_dim, self.state_dim = head_dim or max(1, 2 * d_model // n_heads), state_dim
        self.shared_by, self.least_step, self.eps = n_heads // n_groups, least_step, eps
        widths = {"value": n_heads * self.head_dim, "key": n_groups * state_dim, "query": n_groups * state_dim}
        for name, width in widths.items():
            self.add_module(name, Linear(d_model, width, bias=False))
            self.add_module(f"{name}_conv", CausalConv(width, taps, bias=True))
        self.gate = Linear(d_model, n_heads * self.head_dim, bias=False)
        self.time = Linear(d_model, n_heads, bias=False)
        self.time_bias, self.log_rate, self.skip = (nn.Parameter(torch.empty(n_heads)) for _ in range(3))
        self.weight = nn.Parameter(torch.empty(n_heads * self.head_dim))
        self.output = Linear(n_heads * self.head_dim, d_model, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        draw_time_steps(self.time_bias)
        self.log_rate.copy_(torch.arange(1, len(self.log_rate) + 1, device=self.log_rate.device).log())
        self.skip.fill_(1.0)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        (v, v_tail), (k, k_tail), (q, q_tail) = (self.convolved(name, x, given.segments, held) for name in CONVOLVED)
        v = v if held is None else held.without_padding(v)  # of the convolution's bias
        v = v.unflatten(-1, (-1, self.head_dim))
        k, q = (t.unflatten(-1, (-1, self.state_dim)).repeat_interleave(self.shared_by, 2) for t in (k, q))
        steps = F.softplus(at_least_fp32(self.time(x)) + self.time_bias).clamp(min=self.least_step)[..., None]
        decay = -at_least_fp32(self.log_rate).exp()[:, None] * steps
        y, state = self.recurred(q, k, at_least_fp32(v) * steps, decay, None, given.segments, held)
        y = self._normalised((y + self.skip[:, None] * v).flatten(-2) * F.silu(at_least_fp32(self.gate(x))))
        return self.output(y.to(x.dtype)), {**v_tail, **k_tail, **q_tail, **state}

    def _normalised(self, y: Tensor) -> Tensor:
        groups = y.unflatten(-1, (-1, self.shared_by * self.head_dim))
        return (groups * (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight

    def drawn(self) -> Drawn:
        heads = len(self.skip)
        groups = f"{heads // self.shared_by} groups of keys and queries of {self.state_dim}"
        return Drawn((f"{heads} heads of {self.head_dim}", groups, self.convolutions()))

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"state": (len(self.skip), self.state_dim, self.head_dim)}

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = {name: "column" for name, _ in self.named_parameters()}
        return {**split, "output.weight": "row"}
