"""The contract of ``experts``: feed-forward networks, each applied to the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Kind, Placement
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.grouped_matmul import Choices, combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, NonNegative, Positive


@family("experts", context=("n_experts",))
class Experts(Block):
    """Weights are stacked (E, …), so a checkpoint has one tensor for all and expert parallelism splits dimension 0.

    Dropless: every token reaches every expert in its routing.
    """

    counted_as: ClassVar[str | None] = "routed_experts"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [T,D] → Σ over a token's k experts of weight · expert(x), [T,D]."""
        raise NotImplementedError


class Stacked(Experts):
    """y = Σ_k w_k W_down,e hidden(W_e x): the shared base of single networks.

    The router's weight is applied to the hidden vector, the narrow side, and to an output bias. Experts are no modules,
    and no token is dropped.

    Class attributes:
        halves: 2: ``gate_up`` holds gate rows, then up rows, as transformers stores them; 1: there is ``up`` alone
        biased: whether both layers add a bias
        hidden: a method: the halves of the rows of tokens' experts, [·,F] each → [·,F]
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"gate_up": "matrix", "up": "matrix", "down": "matrix"}
    residual_outputs: ClassVar[tuple[str, ...]] = ("down",)
    halves: ClassVar[int] = 2
    biased: ClassVar[bool] = False
    hidden: Callable[..., Tensor]
    gate_up: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, d_model: int, n_experts: int, d_ff: Count) -> None:
        super().__init__()
        self.n_experts, self.first = n_experts, "gate_up" if self.halves == 2 else "up"
        for name, shape in {self.first: (self.halves * d_ff, d_model), "down": (d_model, d_ff)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts, *shape)))
            if self.biased:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(n_experts, shape[0])))

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                parameter.zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        order = sort_by_expert(routing.experts, self.n_experts, routing.pairs)
        rows = grouped_matmul(dispatch(x, order), getattr(self, self.first).to(x.dtype), order.ends)
        weights = routing.weights.flatten().index_select(0, order.sorted).to(rows.dtype)[:, None]
        if not self.biased:
            hidden = self.hidden(*rows.chunk(self.halves, -1)) * weights
            return combine(grouped_matmul(hidden, self.down.to(x.dtype), order.ends), order)
        expert = routing.experts.flatten().index_select(0, order.sorted).clamp(max=self.n_experts - 1)
        rows = rows + getattr(self, f"{self.first}_bias")[expert].to(rows.dtype)
        hidden = self.hidden(*rows.chunk(self.halves, -1)) * weights
        rows = grouped_matmul(hidden, self.down.to(x.dtype), order.ends)
        return combine(rows + self.down_bias[expert].to(rows.dtype) * weights, order)

    def parallel_plan(self) -> dict[str, Placement]:
        return {name: "expert" for name, _ in self.named_parameters(recurse=False)}


@register("experts", "swiglu")
class SwiGLUExperts(Stacked):
    """SwiGLU networks as routed experts.

    Shazeer 2020, arXiv 2002.05202; Dai et al. 2024, arXiv 2401.06066:
    y = Σ_k w_k W_down,e (silu(W_gate,e x) ⊙ W_up,e x).

    Args:
        d_ff: F, hidden width of one expert
    """

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        choices = Choices(routing.experts, routing.weights, routing.pairs)
        return self.kernels.swiglu_experts(x, choices, self.gate_up, self.down)


@register("experts", "bounded_swiglu")
class BoundedSwiGLUExperts(Stacked):
    """``swiglu`` whose halves are bounded: silu(min(g, limit)) ⊙ clamp(u, ±limit), as in DeepSeek-V4.

    Weights are those of ``swiglu``. gpt-oss's ``clamped_swiglu`` has biases, a sharper gate and a one added to u.

    Args:
        d_ff: F, hidden width of one expert
        limit: bound of the two halves before the gate
    """

    def __init__(self, d_model: int, n_experts: int, d_ff: Count, limit: Positive = 10.0) -> None:
        super().__init__(d_model, n_experts, d_ff)
        self.limit = limit

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


@register("experts", "clamped_swiglu")
class ClampedSwiGLUExperts(Stacked):
    """gpt-oss's experts: SwiGLU with biases, a clamp, a sharper gate and a one added to the linear half.

    OpenAI 2025 (gpt-oss), arXiv 2508.10925: [g; u] = W_gate_up,e x + b_gate_up,e; g ← min(g, limit),
    u ← clamp(u, ±limit); y = Σ_k w_k (W_down,e (g σ(alpha g) ⊙ (u + 1)) + b_down,e).

    ``gate_up`` holds gate rows, then up rows, as in all experts here; the released weights interleave them and are
    transposed.

    Args:
        d_ff: F, hidden width of one expert
        limit: bound of the two halves; 7 in gpt-oss
        alpha: sharpness of the gate; 1.702 makes it nearly a GELU
    """

    biased: ClassVar[bool] = True

    def __init__(
        self, d_model: int, n_experts: int, d_ff: Count, limit: Positive = 7.0, alpha: NonNegative = 1.702
    ) -> None:
        super().__init__(d_model, n_experts, d_ff)
        self.limit, self.alpha = limit, alpha

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * (gate * self.alpha).sigmoid() * (up + 1)


@register("experts", "geglu")
class GEGLUExperts(Stacked):
    """``swiglu`` with a GELU gate: gelu(g) ⊙ u, by the tanh approximation, as in Gemma 4.

    Shazeer 2020, arXiv 2002.05202. Weights are those of ``swiglu``.

    Args:
        d_ff: F, hidden width of one expert
    """

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up


@register("experts", "relu2")
class ReLU2Experts(Stacked):
    """Two-layer networks with a squared ReLU as routed experts.

    So et al. 2021 (Primer), arXiv 2109.08668; Nemotron 3, arXiv 2512.20856: y = Σ_k w_k W_down,e relu(W_up,e x)².

    Args:
        d_ff: F, hidden width of one expert
    """

    halves: ClassVar[int] = 1

    def hidden(self, up: Tensor) -> Tensor:
        return F.relu(up).square()


def situ_glu(gate: Tensor, up: Tensor, bound: float, linear_bound: float | None) -> Tensor:
    """β tanh(g/β) σ(g) ⊙ λ tanh(u/λ), of any shape. For small g and u it is silu(g) ⊙ u, and never beyond β λ.

    Args:
        gate, up: g and u
        bound: β
        linear_bound: λ; None leaves u as it is
    """
    up = up if linear_bound is None else linear_bound * (up / linear_bound).tanh()
    return bound * (gate / bound).tanh() * gate.sigmoid() * up


@register("experts", "situ")
class SiTUExperts(Stacked):
    """``swiglu`` whose halves saturate smoothly, unlike those of ``bounded_swiglu``.

    Kimi K3, arXiv 2607.24653: y = Σ_k w_k W_down,e (β tanh(g/β) σ(g) ⊙ λ tanh(u/λ)) with [g; u] = W_gate_up,e x.

    Args:
        d_ff: F, hidden width of one expert
        bound: β, of the gate; 4 in K3
        linear_bound: λ, of the other half; 25 in K3, null for none
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_ff: Count,
        bound: Positive = 4.0,
        linear_bound: Positive | None = 25.0,
    ) -> None:
        super().__init__(d_model, n_experts, d_ff)
        self.bound, self.linear_bound = bound, linear_bound

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return situ_glu(gate, up, self.bound, self.linear_bound)


@register("experts", "latent")
class Latent(Experts):
    """Experts that work in a latent narrower than the model: latent MoE.

    Elango et al. 2026 (Nemotron 3 Super and Ultra), arXiv 2601.18089: y = W_up Σ_k w_k expert_k(W_down x). The gate and
    shared experts see x itself. The experts' weights, and under expert parallelism what is sent of a token, are ℓ/D of
    those at full width, which pays for more experts and more choices.

    Kimi K3, arXiv 2607.24653, normalises the sum before W_up: ``up_norm``.

    ``W_up`` is not among ``residual_outputs``: depth-scaled initialisation shrinks the experts' own output already.

    Args:
        experts: those that work on the latent
        width: ℓ, of the latent; null is d_model / 4, as in Nemotron 3 Super
        up_norm: of the experts' sum, before W_up; null for none
    """

    def __init__(self, experts: Experts, d_model: int, width: Count | None = None, up_norm: Norm | None = None) -> None:
        super().__init__()
        self.experts, self.up_norm = experts, up_norm
        self.down = Linear(d_model, _width(d_model, width), bias=False)
        self.up = Linear(_width(d_model, width), d_model, bias=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        width = _width(known["d_model"], known["width"])
        return {"dim": width} if child == "up_norm" else {"d_model": width}

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        y = self.experts(self.down(x), routing)
        return self.up(y if self.up_norm is None else self.up_norm(y))


def _width(d_model: int, width: int | None) -> int:
    return width or max(1, d_model // 4)


@register("experts", "with_identity")
class WithIdentity(Experts):
    """Experts of which the last few return their input, so that a token may choose to compute less.

    LongCat-Flash, arXiv 2509.01322 ("zero-computation experts"): y = Σ_{i chosen, i < E − Z} g_i expert_i(x) +
    Σ_{i chosen, i ≥ E − Z} g_i x. The gate sees E experts; the inner block holds the E − Z that compute.

    Args:
        experts: those that compute
        n_idle: Z, experts without parameters; 256 of 768 in LongCat-Flash
    """

    def __init__(self, experts: Experts, n_experts: int, n_idle: Count = 1) -> None:
        super().__init__()
        _check(n_experts, n_idle)
        self.experts, self.n_computing = experts, n_experts - n_idle

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        _check(known["n_experts"], known["n_idle"])
        return {"n_experts": known["n_experts"] - known["n_idle"]}

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        E, idle = self.n_computing, routing.experts >= self.n_computing
        experts, weights = routing.experts.clamp(max=E), routing.weights.masked_fill(idle, 0.0)
        inner = Routing(experts, weights, routing.probs[:, :E], {}, routing.load[:E], experts.numel())
        weights = routing.weights.to(torch.promote_types(x.dtype, torch.float32)) * idle
        return self.passed(x, weights.sum(-1, keepdim=True), self.experts(x, inner))

    def passed(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        """Outputs y [T,D] of the computing experts, and the idle ones' total weight [T,1] → [T,D]."""
        return y + x * weight.to(x.dtype)


def _check(n_experts: int, n_idle: int) -> None:
    if n_idle >= n_experts:
        raise BlockError("n_idle", n_idle, f"must leave some of the {n_experts} experts", "Lower it, or add experts")


@register("experts", "with_skip")
class WithSkip(WithIdentity):
    """Experts of which the last few return nothing: ``with_identity`` without the input's part.

    ZAYA1, arXiv 2511.17127, has one such expert.
    """

    def passed(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return y
