from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.base import even_heads
from blockwright.blocks.attention.recurrent import Parts, Recurrent
from blockwright.blocks.base import Drawn, Placement
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.precision import at_least_fp32
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive

SHIFTED = ("query", "decay", "key", "value", "rate", "gate")
FIRST = "rwkv7.values"  # of the first layer, in ``carry``
FASTEST = math.exp(-0.5)  # bound of −g


@register("attention", "rwkv7")
class RWKV7(Recurrent):
    """RWKV-7: a matrix per head that is decayed by channel, and erased at another key than it is written at.

    Peng et al. 2025 (Goose), arXiv 2503.14456. Six inputs x_* = x + μ_* ⊙ (x_{t−1} − x) see the token before, for
    q, k, v = W x_* (r in the paper), a = σ(W_a x_a) (how fast it learns), g = −e^{−1/2} σ(W_g tanh(W_gd x_g)) and
    z = W_zu σ(W_zd x_z); W_a and W_g are of low rank, with a bias. Values move towards the first layer's:
    v ← v + σ(W_v x_v) ⊙ (v_1 − v). With κ = k ⊙ ξ of length 1 a head and k̃ = k ⊙ (1 + (a − 1) ⊙ α):
    S' = Diag(e^g) S − (a ⊙ κ) (Sᵀ κ)ᵀ + k̃ vᵀ; y = W_o (z ⊙ (norm(S'ᵀ q) + (Σ q ⊙ k̃ ⊙ ρ) v)).

    Erasing reads the state before its decay, as κ ⊙ e^{−g} reads it after, and e^{−g} is at most 1.84. The norm is over
    each head, with eps 64e-5 at the paper's width of 64. μ, biases, ξ, α, ρ and the norm's gains begin as in BlinkDL's
    and fla's code; matrices as the model's ``init`` says, where those codes draw orthogonal ones and begin with W_o and
    the lower halves of low rank at zero. The channel mixing of RWKV-7 is an ``ffn`` without it: ``relu2``. The cache
    holds N·H·H numbers and the last input, whatever the length. Layer 0 has no W_v.

    Args:
        n_heads: N, heads; each has a state of H × H numbers
        head_dim: H, width of a head; null is d_model / n_heads
        decay_rank: width inside g; null is 2.5 √d_model H / 64, to the nearest multiple of 32
        rate_rank: width inside a; null is the same
        value_rank: width inside v; null is 1.7 √d_model H / 64, to the nearest multiple of 32
        gate_rank: width inside z; null is 5 √d_model, to the nearest multiple of 32
        eps: of the norm, for each channel of a head

    Raises:
        BlockError: the first layer's values have another shape
    """

    conformance_settings: ClassVar[dict[str, object]] = {
        **dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), 6),
        "eps": 0.01,  # as in gated_delta
    }

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        n_layers: int,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        decay_rank: Count | None = None,
        rate_rank: Count | None = None,
        value_rank: Count | None = None,
        gate_rank: Count | None = None,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        H = head_dim or even_heads(d_model, n_heads)
        self.head_dim, self.eps, self.depth = H, eps, (layer_idx, n_layers)
        self.mixes_first = layer_idx > 0  # all that a pass reads of the depth: layers above the first share a graph
        width = n_heads * H
        self.query, self.key, self.value = (Linear(d_model, width, bias=False) for _ in range(3))
        self.output = Linear(width, d_model, bias=False)
        low = {"decay": (decay_rank, 2.5 * H / 64), "rate": (rate_rank, 2.5 * H / 64)}
        low |= {"first": (value_rank, 1.7 * H / 64)} if layer_idx else {}
        for name, (rank, factor) in {**low, "gate": (gate_rank, 5.0)}.items():
            inner = rank or max(32, round(factor * d_model**0.5 / 32) * 32)
            self.add_module(f"{name}_down", Linear(d_model, inner, bias=False))
            self.add_module(f"{name}_up", Linear(inner, width, bias=name != "gate"))
        for name in SHIFTED:
            self.register_parameter(f"shift_{name}", nn.Parameter(torch.empty(d_model)))
        self.erased, self.learned, self.bonus = (nn.Parameter(torch.empty(width)) for _ in range(3))  # ξ, α, ρ
        self.weight, self.bias = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def reset_parameters(self) -> None:
        layer, layers = self.depth
        deep, shallow = layer / max(1, layers - 1), 1 - layer / layers
        powers = {"query": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
        D = self.query.in_features
        inputs = torch.arange(D, dtype=torch.float32) / D
        for name, power in powers.items():
            self.get_parameter(f"shift_{name}").copy_(1 - inputs ** (power * shallow))
        place = torch.linspace(0, 1, len(self.erased), dtype=torch.float32)
        ends = torch.linspace(-1, 1, self.head_dim, dtype=torch.float32).repeat(len(place) // self.head_dim)
        zigzag = ends * ends.abs()
        self.get_parameter("decay_up.bias").copy_(-5.5 + 6 * place ** (1 + deep**0.3) + 2.5 * zigzag)
        self.get_parameter("rate_up.bias").copy_(-0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))
        if layer:
            self.get_parameter("first_up.bias").copy_(0.73 - 0.4 * (place - 0.5))
        self.erased.copy_(0.71 - 0.1 * (place - 0.5))
        self.learned.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.weight.fill_(((layer + 1) / layers) ** 0.7)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        earlier, last = self.before(x, given.segments, held)
        shifted = {name: torch.lerp(x, earlier, self.get_parameter(f"shift_{name}")) for name in SHIFTED}
        q, k, v = (self._heads(getattr(self, name)(shifted[name])) for name in ("query", "key", "value"))
        # The values [B,T,N,H], mixed with those of the first layer that has this block
        first = v if given.carry is None else given.carry.setdefault(FIRST, v)
        if first.shape != v.shape:
            rule = f"mixes values of {tuple(v.shape[2:])} with the first layer's, of {tuple(first.shape[2:])}"
            raise BlockError("n_heads", v.shape[2], rule, "Give all layers of rwkv7 the same heads")
        v = torch.lerp(v, first, self._low("first", shifted["value"]).to(v.dtype)) if self.mixes_first else v
        decay = -FASTEST * self._low("decay", shifted["decay"], torch.tanh)
        rate = self._low("rate", shifted["rate"])
        erased = F.normalize(at_least_fp32(k * self._heads(self.erased)), dim=-1)
        k = k * (1 + (rate - 1) * self._heads(self.learned))
        erasing = {"erase": erased * (-decay).exp(), "at": erased * rate}
        y, state = self.recurred(q, k, at_least_fp32(v), decay, None, given.segments, held, **erasing)
        heads = F.layer_norm(y, (self.head_dim,), eps=self.eps * self.head_dim)
        normalised = heads * self._heads(self.weight) + self._heads(self.bias)
        y = normalised + (q * k * self._heads(self.bonus)).sum(-1, keepdim=True) * v
        gate = self.get_submodule("gate_up")(self.get_submodule("gate_down")(shifted["gate"]).sigmoid())
        return self.output((y.flatten(-2) * gate).to(x.dtype)), {**last, **state}

    def _low(self, name: str, x: Tensor, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """σ of a projection of low rank [B,T,N,H], in at least fp32."""
        inner = self.get_submodule(f"{name}_down")(x)
        outer = self.get_submodule(f"{name}_up")(inner if between is None else between(inner))
        return self._heads(at_least_fp32(outer).sigmoid())

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def drawn(self) -> Drawn:
        return Drawn((f"{self.value.out_features // self.head_dim} heads of {self.head_dim}",))

    def memory(self) -> dict[str, tuple[int, ...]]:
        heads = self.value.out_features // self.head_dim
        return {"state": (heads, self.head_dim, self.head_dim), "last": (self.value.in_features,)}

    def parallel_plan(self) -> dict[str, Placement]:
        names = [name for name, _ in self.named_parameters() if "_down." not in name and not name.startswith("shift_")]
        split: dict[str, Placement] = dict.fromkeys(names, "column")
        return {**split, "output.weight": "row"}
