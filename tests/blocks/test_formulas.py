"""Small blocks against their papers' formulas: results and gradients in double precision, at odd sizes.

A row of the table is a block, one of its settings, and its formula as its paper has it, on its own weights. What every
block promises besides (precision, meta build, plans, effect of each setting, …) is the conformance kit's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.gating.base import Routing

B, T, D, N, K, H, E = 3, 7, 45, 4, 2, 11, 6
CONTEXT: dict[str, dict[str, Any]] = {
    "ffn": {},
    "norm": {"dim": D},
    "qk_norm": {"n_heads": N, "n_kv_heads": K, "head_dim": H},
    "output_gate": {"n_heads": N, "head_dim": H},
    "experts": {"n_experts": E},
}
AROUND = {"gating": {"name": "softmax_topk", "top_k": 2}, "experts": {"name": "swiglu", "d_ff": 12}, "norm": "rmsnorm"}
ELSEWHERE = {"ffn/none", "ffn/shortcut"}  # with tests of their own
CASES: list[Any] = []


def formula(kind: str, name: str, *settings: dict[str, Any]) -> Callable[[Any], Any]:
    def put(right: Any) -> Any:
        for s in settings or ({},):
            CASES.append(pytest.param(kind, {"name": name, **s}, right, id=f"{kind}/{name} {s or ''}"))
        return right

    return put


def given(kind: str) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (0.5 + 2 * torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()

    if kind == "experts":  # of every second token one choice is no expert, and expert 1 has no token
        scores = torch.rand(B * T, E, generator=g)
        scores[:, 1] = -1
        ids, weights = scores.topk(3).indices, torch.rand(B * T, 3, generator=g).double().requires_grad_()
        ids[::2, 1] = E
        return drawn(B * T, D), Routing(ids, weights, scores, {}, torch.zeros(E), int((ids < E).sum()))
    shapes = {"qk_norm": [(B, T, N, H), (B, T, K, H)], "output_gate": [(B, T, D), (B, T, N, H)]}
    return tuple(drawn(*shape) for shape in shapes.get(kind, [(B, T, D)]))


def tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Routing):
        yield found.weights
    elif isinstance(found, tuple):
        for each in found:
            yield from tensors(each)
    elif isinstance(found, Tensor):
        yield found


@pytest.mark.parametrize(("kind", "node", "right"), CASES)
def test_block_is_its_formula(make_block: Callable[..., Any], kind: str, node: Any, right: Any) -> None:
    block = make_block(kind, node, around=AROUND, d_model=D, **CONTEXT[kind])
    inputs = given(kind)
    expected = right(block, *inputs)
    found = block(*inputs)
    found = found[0] if kind == "ffn" else found
    single = any(isinstance(p, Tensor) and p.dtype == torch.float32 for p in block.parameters()) or "moe" in str(node)
    learning = [t for t in (*tensors(inputs), *block.parameters()) if t.requires_grad]
    for y, z in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-5 if single else 1e-11)
        weigh = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        pairs = [torch.autograd.grad(t, learning, weigh, retain_graph=True, allow_unused=True) for t in (y, z)]
        for own, other in zip(*pairs, strict=True):
            assert (own is None) == (other is None)
            if own is not None:
                torch.testing.assert_close(own, other, rtol=1e-4 if single else 1e-7, atol=1e-4 if single else 1e-9)


def test_every_block_of_these_kinds_has_a_formula() -> None:
    told = {f"{case.values[0]}/{case.values[1]['name']}" for case in CASES} | ELSEWHERE
    assert told == {f"{kind}/{name}" for kind in CONTEXT for name in registry.names(kind)}


@pytest.mark.parametrize(
    ("kind", "node", "right"),
    [
        ("ffn", "swiglu", {"up.weight": (128, 48)}),  # ⌈8/3 · 48⌉ to a multiple of 64
        ("ffn", "gelu", {"up.weight": (192, 48)}),
        ("ffn", {"name": "swiglu", "d_ff": 5}, {"up.weight": (5, 48), "down.weight": (48, 5)}),
        ("norm", "rmsnorm1p", {"weight": 0.0}),
        ("norm", {"name": "dynamic_tanh", "alpha": 0.3}, {"alpha": 0.3}),
        ("ffn", "xielu", {"positive": math.log(math.expm1(0.8)), "negative": math.log(math.expm1(0.3))}),
        ("experts", {"name": "swiglu", "d_ff": 5}, {"gate_up": (E, 10, 48), "down": (E, 48, 5)}),
    ],
)
def test_sizes_and_initial_values(make_block: Callable[..., Any], kind: str, node: Any, right: dict[str, Any]) -> None:
    block = make_block(kind, node, around=AROUND, **{**CONTEXT[kind], "d_model": 48})
    with torch.no_grad():
        getattr(block, "reset_parameters", lambda: None)()
    for name, value in right.items():
        found = block.get_parameter(name)
        assert (
            found.shape == value
            if isinstance(value, tuple)
            else torch.allclose(found.double(), torch.tensor(value).double())
        )


def sigmoid(u: Tensor) -> Tensor:
    return 1 / (1 + (-u).exp())


def gelu(u: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return u * sigmoid(1.702 * u) if approximate == "sigmoid" else 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))


def situ(g: Tensor, u: Tensor, bound: float, linear: float | None) -> Tensor:
    return bound * torch.tanh(g / bound) * sigmoid(g) * (u if linear is None else linear * torch.tanh(u / linear))


def bounded(g: Tensor, u: Tensor, limit: float) -> Tensor:
    g = torch.minimum(g, torch.tensor(limit))
    return g * sigmoid(g) * torch.maximum(torch.minimum(u, torch.tensor(limit)), torch.tensor(-limit))


GLU: dict[str, tuple[list[dict[str, Any]], Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "swiglu": ([{}], lambda f, g, u: g * sigmoid(g) * u),
    "geglu": ([{"approximate": a} for a in ("tanh", "none")], lambda f, g, u: gelu(g, f.approximate) * u),
    "situ": ([{"bound": 3.0, "linear_bound": b} for b in (7.0, None)], lambda f, g, u: situ(g, u, 3.0, f.linear_bound)),
    "bounded_swiglu": ([{"limit": 1.5}], lambda f, g, u: bounded(g, u, 1.5)),
}
for name, (settings, act) in GLU.items():
    formula("ffn", name, *({"d_ff": 20, **s} for s in settings))(
        lambda f, x, act=act: act(f, x @ f.gate.weight.T, x @ f.up.weight.T) @ f.down.weight.T
    )


@formula(
    "ffn",
    "gelu",
    *({"d_ff": 20, "bias": b, "approximate": a} for b in (False, True) for a in ("tanh", "none", "sigmoid")),
)
def _(f: Any, x: Tensor) -> Tensor:
    b, c = (f.up.bias, f.down.bias) if f.up.bias is not None else (0, 0)
    return gelu(x @ f.up.weight.T + b, f.approximate) @ f.down.weight.T + c


@formula("ffn", "relu2", {"d_ff": 20})
def _(f: Any, x: Tensor) -> Tensor:
    return (x @ f.up.weight.T).clamp(min=0) ** 2 @ f.down.weight.T


@formula("ffn", "xielu", {"d_ff": 20})
def _(f: Any, x: Tensor) -> Tensor:
    u, p, n = x @ f.up.weight.T, (1 + f.positive.exp()).log(), 0.5 + (1 + f.negative.exp()).log()
    return (torch.where(u > 0, p * u**2, n * (u.exp() - 1 - u)) + u / 2) @ f.down.weight.T


@formula("ffn", "gated_swiglu", {"d_ff": 20})
def _(f: Any, x: Tensor) -> Tensor:
    g = x @ f.gate.weight.T
    return sigmoid(x @ f.token_gate.weight.T) * ((g * sigmoid(g) * (x @ f.up.weight.T)) @ f.down.weight.T)


@formula(
    "ffn",
    "moe",
    *({"n_experts": E, "shared": s} for s in (None, {"name": "swiglu", "d_ff": 20})),
    {"n_experts": E, "expert_norm": "rmsnorm"},
)
def _(f: Any, x: Tensor) -> Tensor:
    h = x if f.expert_norm is None else f.expert_norm(x)
    y = by_token(EXPERTS["swiglu"], f.experts, h.flatten(0, 1), f.gating(x)).view_as(x)
    return y if f.shared is None else y + f.shared(x)[0]


@formula("ffn", "scaled", {"ffn": {"name": "swiglu", "d_ff": 20}})
def _(f: Any, x: Tensor) -> Tensor:
    return f.gain * f.ffn(x)[0]


@formula("ffn", "side_by_side", {"dense": {"name": "geglu", "d_ff": 20}, "sparse": {"name": "moe", "n_experts": E}})
def _(f: Any, x: Tensor) -> Tensor:
    return f.dense_out_norm(f.dense(f.dense_norm(x))[0]) + f.sparse_out_norm(f.sparse(x)[0])


def glu(act: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, int, Tensor], Tensor]:
    return lambda f, e, x: f.down[e] @ act(*(f.gate_up[e] @ x).chunk(2))


def clamped(f: Any, e: int, x: Tensor) -> Tensor:
    g, u = (f.gate_up[e] @ x + f.gate_up_bias[e]).chunk(2)
    g, u = torch.minimum(g, torch.tensor(7.0)), u.clamp(-7, 7)
    return f.down[e] @ ((u + 1) * g * sigmoid(1.702 * g)) + f.down_bias[e]


EXPERTS: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "swiglu": glu(lambda g, u: g * sigmoid(g) * u),
    "geglu": glu(lambda g, u: gelu(g, "tanh") * u),
    "situ": lambda f, e, x: f.down[e] @ situ(*(f.gate_up[e] @ x).chunk(2), f.bound, f.linear_bound),
    "bounded_swiglu": lambda f, e, x: f.down[e] @ bounded(*(f.gate_up[e] @ x).chunk(2), f.limit),
    "relu2": lambda f, e, x: f.down[e] @ (f.up[e] @ x).clamp(min=0) ** 2,
    "clamped_swiglu": clamped,
}


def by_token(act: Callable[[Any, int, Tensor], Tensor], f: Any, x: Tensor, r: Routing) -> Tensor:
    def of(t: int) -> Tensor:
        return sum(
            (w * act(f, e, x[t]) for e, w in zip(r.experts[t].tolist(), r.weights[t], strict=True) if e < E), 0 * x[t]
        )

    return torch.stack([of(t) for t in range(len(x))])


for name, act in EXPERTS.items():
    extra = (
        {"bound": 3.0, "linear_bound": 5.0} if name == "situ" else {"limit": 1.5} if name == "bounded_swiglu" else {}
    )
    formula("experts", name, {"d_ff": 12, **extra})(lambda f, x, r, act=act: by_token(act, f, x, r))


@formula("experts", "with_identity", {"n_idle": 2, "experts": {"name": "swiglu", "d_ff": 12}})
@formula("experts", "with_skip", {"n_idle": 2, "experts": {"name": "swiglu", "d_ff": 12}})
def _(f: Any, x: Tensor, r: Routing) -> Tensor:
    idle, one = float(type(f).__name__ == "WithIdentity"), EXPERTS["swiglu"]
    y = by_token(lambda f, e, x: one(f.experts, e, x) if e < E - 2 else idle * x, f, x, r)
    return y + idle * x * (r.weights * (r.experts == E)).sum(-1, keepdim=True)  # a dropped pair counts as idle


@formula(
    "experts",
    "latent",
    {"width": 9, "experts": {"name": "relu2", "d_ff": 5}},
    {"experts": {"name": "relu2", "d_ff": 5}, "up_norm": "rmsnorm"},
)
def _(f: Any, x: Tensor, r: Routing) -> Tensor:
    y = by_token(EXPERTS["relu2"], f.experts, x @ f.down.weight.T, r)
    return (y if f.up_norm is None else rms(y) * f.up_norm.weight) @ f.up.weight.T


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


EPS = ({"eps": 1e-6}, {"eps": 0.5})
formula("norm", "rmsnorm", *EPS)(lambda f, x: rms(x, f.eps) * f.weight)
formula("norm", "rmsnorm1p", *EPS)(lambda f, x: rms(x, f.eps) * (1 + f.weight))
formula("norm", "unit_rms", *EPS)(lambda f, x: rms(x, f.eps))
formula("norm", "scale_corrected", *EPS)(lambda f, x: rms(x, f.eps) * f.weight)  # as wide as the model
formula("norm", "none")(lambda f, x: x)
formula("norm", "divided", {"by": 3.0})(lambda f, x: rms(x) * f.norm.weight / 3)
formula("norm", "dynamic_tanh")(lambda f, x: f.weight * (f.alpha * x).tanh() + f.bias)


@formula("norm", "layernorm", *({**eps, "bias": b} for eps in EPS for b in (True, False)))
def _(f: Any, x: Tensor) -> Tensor:
    return rms(x - x.mean(-1, keepdim=True), f.eps) * f.weight + (0 if f.bias is None else f.bias)


@formula("norm", "gated", {"rank": 3})
def _(f: Any, x: Tensor) -> Tensor:
    inner = (y := rms(x) * f.weight) @ f.down.weight.T
    return y * sigmoid(inner * sigmoid(inner) @ f.up.weight.T)


@formula("qk_norm", "per_head")
@formula("qk_norm", "full")
def _(f: Any, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    width = len(f.q_norm.weight)
    assert width in (H, N * H)
    wide = width > H
    pairs = ((q, f.q_norm.weight), (k, f.k_norm.weight))
    return tuple((rms(t.flatten(-2)) * g).view_as(t) if wide else rms(t) * g for t, g in pairs)


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": sigmoid,
    "per_head": sigmoid,
    "silu": lambda u: u * sigmoid(u),
    "softplus": lambda u: (1 + u.exp()).log(),
}
for name, act in LOGITS.items():
    formula("output_gate", name)(lambda f, x, y, act=act: y * act(x @ f.project.weight.T).view(B, T, N, -1))


@formula("output_gate", "hybrid", {"rank": 5})
def _(f: Any, x: Tensor, y: Tensor) -> Tensor:
    found = (t @ down.weight.T for t, down in ((x, f.down), (y.flatten(-2), f.down_heads)))
    of_input, of_heads = (u * sigmoid(u) for u in found)
    return y * sigmoid(of_input @ f.up.weight.T + of_heads @ f.up_heads.weight.T).view_as(y)


formula("output_gate", "low_rank", {"rank": 5})(
    lambda f, x, y: y * sigmoid(x @ f.down.weight.T @ f.up.weight.T).view_as(y)
)
