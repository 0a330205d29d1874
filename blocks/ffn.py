"""The contract of ``ffn``: transform each token independently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Drawn, Placement
from blockwright.blocks.convolution import Convolution, convolved
from blockwright.blocks.dropping import Dropping
from blockwright.blocks.experts import Experts, situ_glu
from blockwright.blocks.forward_pass import Carry, Pass
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Positive


@family("ffn")
class FFN(Block):
    """A feed-forward block, dense or a mixture of experts.

    Class attributes:
        adds_left: whether it adds what the feed-forward block of the layer below has left, of all tokens: then
            ``residual=mixture_of_depths`` cannot give it some of them

    Attributes:
        leaves: whether it leaves something for that of the next layer, which is refused unless it ``adds_left``
    """

    adds_left: ClassVar[bool] = False
    leaves: bool = False

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        """Transform each token.

        Args:
            x: [B,T,D]
            given: further data of the tokens; None if x is all there is, as in an input

        Returns:
            [B,T,D], and the routing of the tokens (None when dense)
        """
        raise NotImplementedError


def rounded_width(exact: float, multiple: int = 64) -> int:
    """``exact`` rounded up to a multiple, which matmul units prefer."""
    return -int(-exact // multiple) * multiple


class Gated(FFN):
    """y = W_down (act(W_gate x) ⊙ W_up x): the shared base of ``swiglu`` and its relatives, which have ``activated``.

    Args:
        d_ff: F, hidden width; null is 8/3 of d_model, rounded up to a multiple of 64
        gate_conv: convolves the gate's half of the hidden layer over the last few tokens; null for none
        up_conv: convolves the other half in the same way; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__()
        width = _width(d_model, d_ff)
        self.gate = Linear(d_model, width, bias=False)
        self.up = Linear(d_model, width, bias=False)
        self.down = Linear(width, d_model, bias=False)
        self.gate_conv, self.up_conv = gate_conv, up_conv

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": _width(known["d_model"], known["d_ff"])}

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The two halves [B,T,F] → [B,T,F]."""
        raise NotImplementedError

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        gate, up = convolved(self.gate_conv, self.gate(x), given), convolved(self.up_conv, self.up(x), given)
        return self.down(self.activated(gate, up)), None

    def parallel_plan(self) -> dict[str, Placement]:
        return {"gate.weight": "column", "up.weight": "column", "down.weight": "row"}


def _width(d_model: int, d_ff: int | None) -> int:
    return d_ff or rounded_width(8 * d_model / 3)


@register("ffn", "swiglu")
class SwiGLU(Gated):
    """Gated feed-forward network with a SiLU gate.

    Shazeer 2020, arXiv 2002.05202: y = W_down (silu(W_gate x) ⊙ W_up x). No biases, as in Llama and DeepSeek.
    """

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.kernels.gate_silu(gate, up)


@register("ffn", "bounded_swiglu")
class BoundedSwiGLU(SwiGLU):
    """``swiglu`` whose halves are bounded: silu(min(g, limit)) ⊙ clamp(u, ±limit), as in DeepSeek-V4.

    Args:
        limit: bound of the two halves before the gate
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        limit: Positive = 10.0,
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, gate_conv, up_conv)
        self.limit = limit

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().activated(gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit))


@register("ffn", "gated_swiglu")
class GatedSwiGLU(SwiGLU):
    """SwiGLU whose output is scaled by a learned scalar gate per token.

    The shared expert of Qwen2-MoE, Yang et al. 2024 (Qwen2), arXiv 2407.10671:
    y = σ(w · x) W_down (silu(W_gate x) ⊙ W_up x). As ``shared`` of ``moe`` it is the gated shared expert; DeepSeek's
    shared experts are a plain ``swiglu``.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, gate_conv, up_conv)
        self.token_gate = Linear(d_model, 1, bias=False)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.token_gate(x).sigmoid() * super().forward(x, given)[0], None


@register("ffn", "geglu")
class GEGLU(Gated):
    """Gated feed-forward network with a GELU gate.

    Shazeer 2020, arXiv 2002.05202: y = W_down (gelu(W_gate x) ⊙ W_up x). No biases. As in Gemma, with the tanh
    approximation.

    Args:
        approximate: ``tanh`` as in Gemma, ``none`` for the exact GELU
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        approximate: Literal["tanh", "none"] = "tanh",
        gate_conv: Convolution | None = None,
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, gate_conv, up_conv)
        self.approximate = approximate

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate=self.approximate) * up


class Plain(FFN):
    """y = W_down act(W_up x): the shared base of ``gelu``, ``relu2`` and ``xielu``, which have ``activated``.

    Args:
        d_ff: F, hidden width; null is 4 d_model
        bias: whether both layers add a bias
        up_conv: convolves the hidden layer over the last few tokens, before the activation; null for none
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(
        self, d_model: int, d_ff: Count | None = None, bias: bool = False, up_conv: Convolution | None = None
    ) -> None:
        super().__init__()
        width = d_ff or 4 * d_model
        self.up = Linear(d_model, width, bias=bias)
        self.down = Linear(width, d_model, bias=bias)
        self.up_conv = up_conv

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_ff"] or 4 * known["d_model"]}

    def activated(self, u: Tensor) -> Tensor:
        """[B,T,F] → [B,T,F]."""
        raise NotImplementedError

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.down(self.activated(convolved(self.up_conv, self.up(x), given))), None

    def parallel_plan(self) -> dict[str, Placement]:
        bias: dict[str, Placement] = {} if self.up.bias is None else {"up.bias": "column"}
        return {"up.weight": "column", **bias, "down.weight": "row"}


@register("ffn", "gelu")
class GELU(Plain):
    """Two-layer feed-forward network with GELU.

    Hendrycks & Gimpel 2016, arXiv 1606.08415: y = W_down gelu(W_up x). GPT-2 adds biases and uses the tanh
    approximation, which deviates by up to 5e-4.

    Args:
        approximate: ``tanh`` as in GPT-2, ``sigmoid`` for x σ(1.702 x) as in CLIP, off by up to 0.02; ``none`` for the
            exact GELU
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        bias: bool = False,
        approximate: Literal["tanh", "none", "sigmoid"] = "tanh",
        up_conv: Convolution | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, bias, up_conv)
        self.approximate = approximate

    def activated(self, u: Tensor) -> Tensor:
        sigmoid = self.approximate == "sigmoid"
        return u * (1.702 * u).sigmoid() if sigmoid else F.gelu(u, approximate=self.approximate)


@register("ffn", "moe")
class MoE(FFN):
    """Mixture of experts: routed experts, and shared ones applied to every token.

    Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066: y = shared(x) + Σ_{i chosen} g_i expert_i(x). Shared experts are
    one network of their total width, which computes the same as several; their output is added ungated.

    Args:
        n_experts: E, routed experts
        gating: chooses experts for each token
        experts: the routed experts
        shared: a dense ffn for every token, e.g. ``{name: swiglu, d_ff: 2816}`` for two of width 1408; null for none
        dropping: drops tokens of overloaded experts in training; null for none
        expert_norm: norm of what the routed experts read, and neither the gate nor the shared ones, as in Gemma 4; null
            for none
    """

    def __init__(
        self,
        gating: Gating,
        experts: Experts,
        n_experts: Count = 8,
        shared: FFN | None = None,
        dropping: Dropping | None = None,
        expert_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.gating, self.experts, self.shared, self.dropping = gating, experts, shared, dropping
        self.expert_norm = expert_norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = super().child_context(child, known)
        return {**inner, "dim": known["d_model"]} if child == "expert_norm" else inner

    def drawn(self) -> Drawn:
        return Drawn(hides=("n_experts",))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing]:
        known = {} if given is None else {"experts": given.experts, "real": given.real}
        known = {name: value for name, value in known.items() if value is not None}  # a plug-in's gate need not take it
        routing = self.gating(x, None if given is None else given.tokens, **known)
        if self.dropping is not None:
            routing = self.dropping(routing, x.shape[:2])
        h = x if self.expert_norm is None else self.expert_norm(x)
        y = self.experts(h.flatten(0, 1), routing).view_as(x)
        return (y if self.shared is None else y + self.shared(x, given)[0]), routing


@register("ffn", "none")
class NoFFN(FFN):
    """No feed-forward block: y = 0, for layers that only mix tokens.

    Nemotron-H, arXiv 2504.03624. With ``residual: {name: prenorm, ffn_norm: none}`` the layer has no
    norm for it either.
    """

    empty: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return x * 0, None  # not zeros: the norm before it must have a gradient, or data parallelism stops


@register("ffn", "relu2", fixes={"bias": False})
class ReLU2(Plain):
    """Two-layer feed-forward network with a squared ReLU.

    So et al. 2021 (Primer), arXiv 2109.08668: y = W_down relu(W_up x)². No biases.
    """

    def activated(self, u: Tensor) -> Tensor:
        return F.relu(u).square()


@register("ffn", "scaled")
class Scaled(FFN):
    """Another feed-forward block, whose output a learned number multiplies: y = g · ffn(x).

    Inkling (Thinking Machines 2026), in its dense layers. g starts at 1.

    Args:
        ffn: the other block; ``swiglu`` if none is named
    """

    default_children: ClassVar[Mapping[str, Any]] = {"ffn": {"name": "swiglu"}}

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn = ffn
        self.gain = nn.Parameter(torch.empty(1))

    def drawn(self) -> Drawn:
        return Drawn(("a learned factor",))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        y, routing = self.ffn(x, given)
        return y * self.gain, routing


LATE = "late"  # what layers leave in the carry, [B,T,D]


@register("ffn", "shortcut")
class Shortcut(FFN):
    """A feed-forward block whose second branch is added one layer later, past the attention between.

    Cai et al. 2024 (ScMoE), arXiv 2404.05019; LongCat-Flash, arXiv 2509.01322: y_l = now_l(x_l) + later_{l−1}(x_{l−1}).
    Experts as ``later`` may be exchanged over ranks while the next layer's attention computes. A layer of LongCat, two
    attentions, two dense networks and experts, is two of these layers: the first has ``later``, the second has not. In
    the last layer there is no later one, and ``later`` is added at once.

    What is late crosses depth in the carry. It is only added, so no gradient needs its value: recomputed alone, this
    block may add what it left itself. The dense branch of a layer with experts is counted with its shared experts.

    Args:
        now: added in this layer; null for none
        later: added in the next layer; null for none
    """

    adds_left: ClassVar[bool] = True
    default_children: ClassVar[Mapping[str, Any]] = {"now": {"name": "swiglu"}}
    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "now": {"name": "swiglu", "d_ff": 16},
        "later": {"name": "swiglu", "d_ff": 24},
    }

    def __init__(self, n_layers: int, layer_idx: int, now: FFN | None = None, later: FFN | None = None) -> None:
        super().__init__()
        if now is not None and any(isinstance(block, Gating) for block in now.modules()):
            raise BlockError("now", type(now).__name__, "must be dense: a layer reports one routing", "Route in later")
        self.now, self.later, self.leaves = now, later, later is not None
        self.last = layer_idx >= n_layers - 1

    def drawn(self) -> Drawn:
        return Drawn(("its second branch joins the next layer",) if self.later is not None and not self.last else ())

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        carry: Carry | None = None if given is None else given.carry
        parts = [carry.pop(LATE)] if carry is not None and LATE in carry else []
        parts += [] if self.now is None else [self.now(x, given)[0]]
        routing: Routing | None = None
        if self.later is not None:
            late, routing = self.later(x, given)
            if self.last or carry is None:
                parts.append(late)
            else:
                carry[LATE] = late
        return sum(parts[1:], parts[0]) if parts else x.new_zeros(x.shape), routing


@register("ffn", "side_by_side")
class SideBySide(FFN):
    """A dense feed-forward block and another, such as experts, each between norms of its own.

    Gemma 4 26B-A4B (Google 2026): y = norm₂(dense(norm₁(x))) + norm₃(sparse(x)), where x is the residual stream itself:
    the residual block's ``ffn_norm`` is ``none``, and the experts and their router bring norms (``moe``'s
    ``expert_norm``, ``gating=normed_softmax``). Shared experts of ``moe`` have no norms of their own.

    Args:
        dense: reads all tokens and routes none; ``geglu`` if none is named
        sparse: beside it; ``moe`` if none is named
        dense_norm: of what ``dense`` reads
        dense_out_norm: of what it returns
        sparse_out_norm: of what ``sparse`` returns
    """

    default_children: ClassVar[Mapping[str, Any]] = {"dense": {"name": "geglu"}, "sparse": {"name": "moe"}}
    conformance_settings: ClassVar[Mapping[str, Any]] = {
        "dense": {"name": "geglu", "d_ff": 16},
        "sparse": {"name": "moe", "expert_norm": {"name": "rmsnorm"}},
    }

    def __init__(self, dense: FFN, sparse: FFN, dense_norm: Norm, dense_out_norm: Norm, sparse_out_norm: Norm) -> None:
        super().__init__()
        if any(isinstance(block, Gating) for block in dense.modules()):
            raise BlockError(
                "dense", type(dense).__name__, "routes, and a layer reports one routing", "Route in sparse"
            )
        self.dense, self.sparse = dense, sparse
        self.dense_norm, self.dense_out_norm, self.sparse_out_norm = dense_norm, dense_out_norm, sparse_out_norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]} if child.endswith("norm") else {}

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, Routing | None]:
        y, _ = self.dense(self.dense_norm(x), given)
        z, routing = self.sparse(x, given)
        return self.dense_out_norm(y) + self.sparse_out_norm(z), routing


@register("ffn", "situ")
class SiTU(SwiGLU):
    """``swiglu`` whose halves saturate smoothly, unlike those of ``bounded_swiglu``.

    Kimi K3, arXiv 2607.24653: y = W_down (β tanh(g/β) σ(g) ⊙ λ tanh(u/λ)) with g = W_gate x and u = W_up x.

    Args:
        d_ff: F, hidden width; null is 8/3 of d_model, rounded up to a multiple of 64
        bound: β, of the gate; 4 in K3
        linear_bound: λ, of the other half; 25 in K3, null for none
    """

    def __init__(
        self,
        d_model: int,
        d_ff: Count | None = None,
        bound: Positive = 4.0,
        linear_bound: Positive | None = 25.0,
    ) -> None:
        super().__init__(d_model, d_ff)
        self.bound, self.linear_bound = bound, linear_bound

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.down(situ_glu(self.gate(x), self.up(x), self.bound, self.linear_bound)), None


BETA, EPS = 0.5, -1e-6  # slope at 0; the least distance from 0 of what expm1 sees


@register("ffn", "xielu")
class XIELU(Plain):
    """Two-layer feed-forward network with xIELU, whose two curvatures are learned.

    Huang & Schlag 2024, arXiv 2411.13010; Apertus, arXiv 2509.14233: y = W_down xielu(W_up x) with xielu(u) =
    α_p u² + u/2 for u > 0, else α_n (e^u − 1 − u) + u/2; α_p = softplus(p), α_n = 1/2 + softplus(n), both 0.8 at the
    start. No biases. As in Apertus, e^u − 1 is taken at min(u, −1e-6).
    """

    def __init__(self, d_model: int, d_ff: Count | None = None, up_conv: Convolution | None = None) -> None:
        super().__init__(d_model, d_ff, up_conv=up_conv)
        self.positive, self.negative = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        self.positive.fill_(math.log(math.expm1(0.8)))
        self.negative.fill_(math.log(math.expm1(0.8 - BETA)))

    def activated(self, u: Tensor) -> Tensor:
        above = F.softplus(self.positive) * u.square()
        below = (BETA + F.softplus(self.negative)) * (u.clamp(max=EPS).expm1() - u)
        return torch.where(u > 0, above, below) + BETA * u
