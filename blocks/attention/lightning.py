from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.base import even_heads
from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.base import Placement
from blockwright.blocks.cache.state import State
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.output_gate import OutputGate
from blockwright.registry import register
from blockwright.registry.ranges import Count


@register("attention", "lightning")
class Lightning(Recurrent):
    """Lightning attention: linear attention whose state decays at a fixed rate for each head and depth.

    Qin et al. 2024, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313: q, k, v = silu(W x); S ← e^{−s} S + k vᵀ;
    y = W_o gate(norm(Sᵀ q)), norm over all heads together, without softmax or scale, with head n of N in layer l of L
    decaying by s = 2^{−8n/N} (1 − l/(L − 1 + 1e-5) + 1e-5). MiniMax stores the three projections fused. The cache holds
    N·H·H fp32 numbers, whatever the length.

    Args:
        n_heads: N, heads
        head_dim: H, width of a head; null is d_model / n_heads
        norm: of all heads' outputs together
        output_gate: gates the normalised outputs; null for none
    """

    default_children: ClassVar[Mapping[str, Any]] = {"output_gate": {"name": "elementwise"}}

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        n_layers: int,
        norm: Norm,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        output_gate: OutputGate | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or even_heads(d_model, n_heads)
        depth = 1 - layer_idx / (n_layers - 1 + 1e-5) + 1e-5
        rates = [2 ** (-8 * n / n_heads) * depth for n in range(1, n_heads + 1)]
        # A tensor, so that compiled layers share a graph. It stays on the CPU, and is no weight.
        self.rates = torch.tensor(rates, dtype=torch.float64, device="cpu")
        self.query, self.key, self.value = (Linear(d_model, n_heads * self.head_dim, bias=False) for _ in range(3))
        self.output = Linear(n_heads * self.head_dim, d_model, bias=False)
        self.norm, self.output_gate = norm, output_gate

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        H = known["head_dim"] or even_heads(known["d_model"], known["n_heads"])
        return {"dim": known["n_heads"] * H, "head_dim": H}

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        q, k, v = (
            F.silu(project(x)).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        rates = self.rates.to(x.device, torch.promote_types(x.dtype, torch.float32))
        decay = -rates[:, None].expand(*v.shape[:3], 1)
        y, state = self.recurred(q, k, v, decay, None, given.segments, held)
        y = self.norm(y.flatten(-2)).view_as(y)
        y = y if self.output_gate is None else self.output_gate(x, y)
        return self.output(y.flatten(-2)), state

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"state": (len(self.rates), self.head_dim, self.head_dim)}

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = {f"{name}.weight": "column" for name in ("query", "key", "value")}
        return {**split, "output.weight": "row"}
