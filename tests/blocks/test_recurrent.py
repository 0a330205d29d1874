"""Recurrent mixers against their authors' formulas, written token by token, and beside attention in one model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import Continuations
from blockwright.registry import BlockError, ConfigError
from tests.blocks.small import Make, decoder, drawn, gradients, ids, in_parts, near, order, rewind

D, T, N = 30, 71, 19  # T: more than a chunk, and no multiple of one
Formula = Callable[..., Tensor]
TIGHT = {torch.float64: 1e-9, torch.float32: 3e-4}
NODES: dict[str, dict[str, Any]] = {
    "delta_product": {"n_heads": 4, "n_key_heads": 2, "head_dim": 5, "v_head_dim": 7, "taps": 3, "steps": 3},
    "delta_product, negative": {"n_heads": 2, "head_dim": 7, "negative_eigenvalues": True},
    "erase_then_delta": {"n_heads": 3, "head_dim": 5, "v_head_dim": 7, "taps": 3},
    "momentum_delta": {"n_heads": 4, "n_key_heads": 2, "head_dim": 5, "v_head_dim": 7, "taps": 3},
    "preconditioned_delta": {"n_heads": 4, "n_key_heads": 2, "head_dim": 5, "v_head_dim": 7, "taps": 3},
    "preconditioned_kda": {"n_heads": 3, "head_dim": 5, "v_head_dim": 7, "negative_eigenvalues": True},
    "gated_delta_2": {"n_heads": 3, "head_dim": 5, "v_head_dim": 7, "taps": 3},
    "gated_delta_2, negative": {"n_heads": 2, "head_dim": 7, "v_head_dim": 3, "negative_eigenvalues": True},
    "rwkv7": {"n_heads": 3, "head_dim": 7, "decay_rank": 5, "rate_rank": 3, "value_rank": 4, "gate_rank": 6},
    "log_linear_mamba2": {"n_heads": 4, "head_dim": 5, "state_dim": 3, "n_groups": 2, "taps": 3, "levels": 9},
    "mamba3": {"n_heads": 6, "head_dim": 5, "state_dim": 9, "n_groups": 2},
    "mamba3, three ranks": {"n_heads": 4, "head_dim": 3, "state_dim": 6, "n_groups": 2, "rank": 3, "rotated": 1.0},
}


def gated_delta_2(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """``naive_recurrent_gdn2`` and the layer around it (flash-linear-attention, after NVlabs/GatedDeltaNet-2)."""
    K, V = block.head_dim, block.v_head_dim
    q, k, v = (F.silu(convolved(block.get_submodule(n)(x), block.get_submodule(f"{n}_conv").weight))
               for n in ("query", "key", "value"))  # fmt: skip
    q, k = (unit(t.unflatten(-1, (-1, K))) for t in (q, k))
    v, w = v.unflatten(-1, (-1, V)), block.write(x).sigmoid().unflatten(-1, (-1, V))
    b = block.erase(x).sigmoid().unflatten(-1, (-1, K)) * block.reach
    decay = block.decay
    g = -decay.log_rate.exp()[:, None] * F.softplus((decay.up(decay.down(x)) + decay.bias).unflatten(-1, (-1, K)))
    S, outputs = x.new_zeros(len(x), k.shape[2], K, V), []
    for t in range(x.shape[1]):
        S = g[:, t].exp()[..., None] * S
        S = S - torch.einsum("bnk,bnv->bnkv", k[:, t], torch.einsum("bnkv,bnk->bnv", S, b[:, t] * k[:, t]))
        S = S + torch.einsum("bnk,bnv->bnkv", k[:, t], w[:, t] * v[:, t])
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]) / K**0.5)
    y = torch.stack(outputs, 1)
    y = y * (y.square().mean(-1, keepdim=True) + block.norm.eps).rsqrt() * block.norm.weight
    gate = block.output_gate.up(block.output_gate.down(x)).sigmoid()
    return block.output(y.flatten(2) * gate)


def delta_product(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """The recurrence of the paper, a key, a value and a strength for each step of a token."""
    K, V, n = block.head_dim, block.v_head_dim, block.steps
    q, k, v = (F.silu(convolved(block.get_submodule(c)(x), block.get_submodule(f"{c}_conv").weight))
               for c in ("query", "key", "value"))  # fmt: skip
    q, k = unit(q.unflatten(-1, (-1, K))), unit(k.unflatten(-1, (-1, n, K)))
    q, k = (t.repeat_interleave(block.shared_by, 2) for t in (q, k))
    v, beta = v.unflatten(-1, (-1, n, V)), (block.strength(x).sigmoid() * block.reach).unflatten(-1, (-1, n))
    g = -block.decay.log_rate.exp() * F.softplus(block.decay.project(x) + block.decay.bias)
    S, outputs = x.new_zeros(len(x), k.shape[2], K, V), []
    for t in range(x.shape[1]):
        S = g[:, t].exp()[..., None, None] * S
        for j in range(n):
            error = v[:, t, :, j] - torch.einsum("bnkv,bnk->bnv", S, k[:, t, :, j])
            S = S + torch.einsum("bnk,bnv->bnkv", k[:, t, :, j], beta[:, t, :, j, None] * error)
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]) / K**0.5)
    y = normalised(torch.stack(outputs, 1), block.norm.eps) * block.norm.weight
    return block.output((y * F.silu(block.output_gate.project(x)).view_as(y)).flatten(2))


def of_delta_rule(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q and k of length 1, v, β and e^g by channel, [B,T,N,·], of a delta rule of one step a token."""
    K, N = block.head_dim, block.output.in_features // block.v_head_dim
    q, k, v = (F.silu(convolved(block.get_submodule(c)(x), block.get_submodule(f"{c}_conv").weight))
               for c in ("query", "key", "value"))  # fmt: skip
    q, k = (unit(t.unflatten(-1, (-1, K))).repeat_interleave(block.shared_by, 2) for t in (q, k))
    decay = block.decay
    steps = decay.project(x) + decay.bias
    steps = steps.view(*x.shape[:2], N, -1).expand_as(k)
    kept = (-decay.log_rate.exp()[:, None] * F.softplus(steps)).exp()
    return q, k, v.unflatten(-1, (N, -1)), block.strength(x).sigmoid()[..., None] * block.reach, kept


def left(block: Any, x: Tensor, outputs: list[Tensor]) -> Tensor:
    """What a delta rule makes of the outputs of its states."""
    y, gate = torch.stack(outputs, 1) / block.head_dim**0.5, block.output_gate
    y = normalised(y, block.norm.eps) * block.norm.weight
    g = gate.up(gate.down(x)).sigmoid() if hasattr(gate, "up") else F.silu(gate.project(x))
    return block.output((y * g.view_as(y)).flatten(2))


def erase_then_delta(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """S ← (I − β k kᵀ) (I − γ e eᵀ) Diag(α) S + β k vᵀ, as the paper writes it."""
    q, k, v, beta, kept = of_delta_rule(block, x)
    e = torch.einsum("nkr,btnr->btnk", block.address_up, block.address_down(x).unflatten(-1, (-1, 16)))
    e, gamma, one = unit(e), block.erase_strength(x).sigmoid()[..., None], torch.eye(block.head_dim, dtype=x.dtype)
    S, outputs = x.new_zeros(len(x), *k.shape[2:], v.shape[-1]), []
    for t in range(x.shape[1]):
        erased, corrected = (
            one - (s[:, t] * u[:, t])[..., None] * u[:, t, :, None] for s, u in ((gamma, e), (beta, k))
        )
        S = corrected @ erased @ (kept[:, t, ..., None] * S) + (beta * k)[:, t, ..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]))
    return left(block, x, outputs)


def preconditioned(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """``naive_recurrent_precond_gated_delta_rule`` and ``naive_recurrent_precond_kda`` of flash-linear-attention."""
    q, k, v, beta, kept = of_delta_rule(block, x)
    decay, many = block.curvature, block.shared_by
    g_atk = -decay.log_rate.exp() * F.softplus(decay.project(x) + decay.bias)
    g_atk, beta_atk = (t.repeat_interleave(many, 2) for t in (g_atk, block.curvature_strength(x).sigmoid()))
    centre = block.centre.repeat_interleave(many)[:, None]
    A, S, outputs = torch.zeros_like(k[:, 0]), x.new_zeros(len(x), *k.shape[2:], v.shape[-1]), []
    for t in range(x.shape[1]):
        A = A * g_atk[:, t].exp()[..., None] + beta_atk[:, t, :, None] * k[:, t] ** 2
        ell = torch.log(A + 1e-6) - centre
        M = torch.exp(-math.log(1.5) * ell / (1 + ell.abs()))
        S = S * kept[:, t, ..., None]
        error = beta[:, t] * (v[:, t] - torch.einsum("bnkv,bnk->bnv", S, k[:, t]))
        S = S + torch.einsum("bnk,bnv->bnkv", k[:, t] * M, error)
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]))
    return left(block, x, outputs)


def momentum_delta(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """``recurrent_momentum_delta_rule_ref`` and the layer around it (HuuYuLong/MomentumDeltaNet)."""
    K, V, N = block.head_dim, block.v_head_dim, block.strength.out_features
    q, k, v = (F.silu(convolved(block.get_submodule(c)(x), block.get_submodule(f"{c}_conv").weight))
               for c in ("query", "key", "value"))  # fmt: skip
    q, k = (t.unflatten(-1, (-1, K)).repeat_interleave(block.shared_by, 2) for t in (q, k))
    q, k, v = unit(q - block.log_correction.exp()[:, None] * k) / K**0.5, unit(k), v.unflatten(-1, (N, V))
    log_alpha, log_mu = (-d.log_rate.exp() * F.softplus(d.project(x) + d.bias) for d in (block.decay, block.momentum))
    eta = (block.rate(x) / math.sqrt(D)).tanh() + 1
    theta = torch.arctan(eta * block.log_share.exp())
    beta = theta.sin() ** 2 * block.strength(x).sigmoid()
    alpha, mu = (log_alpha + (theta.cos() ** 2).log()).exp(), log_mu.clamp(min=-2).exp()
    S = M = x.new_zeros(len(x), N, K, V)
    outputs = []
    for t in range(x.shape[1]):
        w = torch.einsum("bnkv,bnk->bnv", S, alpha[:, t, :, None] * k[:, t]) - v[:, t]
        M = mu[:, t, :, None, None] * M + torch.einsum("bnk,bnv->bnkv", eta[:, t, :, None] * k[:, t], w)
        S = alpha[:, t, :, None, None] * S - beta[:, t, :, None, None] * M
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]))
    y = normalised(torch.stack(outputs, 1), block.norm.eps) * block.norm.weight
    return block.output((y * block.output_gate.project(x).sigmoid().view_as(y)).flatten(2))


def rwkv7(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """The layer of flash-linear-attention, with ``dplr_recurrence`` for its state."""
    H = block.head_dim
    delta = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1) - x
    xr, xw, xk, xv, xa, xg = (
        x + delta * block.get_parameter(f"shift_{n}") for n in ("query", "decay", "key", "value", "rate", "gate")
    )
    r, k, v = block.query(xr), block.key(xk), block.value(xv)
    w = -0.6065306597126334 * block.decay_up(block.decay_down(xw).tanh()).sigmoid()
    if first is not None:
        v = torch.lerp(v, first.flatten(2), block.first_up(block.first_down(xv)).sigmoid())
    a, g = block.rate_up(block.rate_down(xa)).sigmoid(), block.gate_up(block.gate_down(xg).sigmoid())
    kk = F.normalize((k * block.erased).unflatten(-1, (-1, H)), dim=-1)
    k = k + k * (a - 1) * block.learned
    r, w, k, v, a = (t.unflatten(-1, (-1, H)) for t in (r, w, k, v, a))
    S, outputs = x.new_zeros(len(x), k.shape[2], H, H), []
    for t in range(x.shape[1]):
        read = torch.einsum("bnkv,bnk->bnv", S, -kk[:, t])
        S = S * w[:, t].exp()[..., None] + torch.einsum("bnk,bnv->bnkv", k[:, t], v[:, t])
        S = S + torch.einsum("bnk,bnv->bnkv", kk[:, t] * a[:, t], read)
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, r[:, t]))
    o = torch.stack(outputs, 1)
    groups = F.group_norm(o.flatten(2).flatten(0, 1), o.shape[2], block.weight, block.bias, block.eps * H)
    bonus = (r * k * block.bonus.unflatten(0, (-1, H))).sum(-1, keepdim=True) * v
    return block.output((groups.view(len(x), -1, o.shape[2] * H) + bonus.flatten(2)) * g)


def log_linear_mamba2(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """States of a Fenwick tree, merged as in the paper: at place t, those below its lowest set bit into the next."""
    N, P = len(block.skip), block.head_dim
    v, k, q = (F.silu(convolved(block.get_submodule(n)(x), c.weight, c.bias))
               for n in ("value", "key", "query") for c in (block.get_submodule(f"{n}_conv"),))  # fmt: skip
    k, q = (t.unflatten(-1, (-1, block.state_dim)).repeat_interleave(block.shared_by, 2) for t in (k, q))
    v, steps = v.unflatten(-1, (N, P)), F.softplus(block.time(x) + block.time_bias)
    shares = F.softplus(block.share * block.level(x).unflatten(-1, (N, -1)))
    levels = torch.zeros(shares.shape[-1], len(x), N, block.state_dim, P, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        if t:
            r = (t & -t).bit_length() - 1
            merged, deeper = levels[: r + 1].sum(0, keepdim=True), levels[r + 2 :]
            levels = torch.cat((torch.zeros_like(levels[: r + 1]), merged, deeper))
        kept = (-steps[:, t] * block.log_rate.exp()).exp()
        new = torch.einsum("bnk,bnv,bn->bnkv", k[:, t], v[:, t], steps[:, t])
        levels = torch.cat((new[None], (kept[..., None, None] * levels)[1:]))
        outputs.append(
            torch.einsum("lbnkv,bnl,bnk->bnv", levels, shares[:, t], q[:, t]) + block.skip[:, None] * v[:, t]
        )
    y = (torch.stack(outputs, 1).flatten(2) * F.silu(block.gate(x))).unflatten(-1, (-1, block.shared_by * P))
    return block.output(normalised(y, block.eps).flatten(2) * block.weight)


def mamba3(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """``mamba3_MIMO_step_ref`` of state-spaces/mamba, and the layer around it; of one rank ``mamba3_siso_step_ref``."""
    P, S, R = block.head_dim, block.state_dim, block.rank
    N = block.value.out_features // P
    ones = x.new_ones(N, R, P)
    mimo_x, mimo_z, mimo_o = (
        ones if f is None else f.view(N, R, P) for f in (block.spread, block.gate_spread, block.joined)
    )
    B, C = ((normalised(p(x).view(*x.shape[:2], -1, R, S), block.eps) * w).repeat_interleave(block.shared_by, 2)
            for p, w in ((block.key, block.key_norm), (block.query, block.query_norm)))  # fmt: skip
    B, C = B + block.key_bias.view(N, R, S), C + block.query_bias.view(N, R, S)
    dt = F.softplus(block.time(x) + block.time_bias)
    A = -F.softplus(block.rate(x)).clamp(min=block.least_rate)
    trap, theta = block.share(x).sigmoid(), block.angle(x).tanh() * math.pi
    v = torch.einsum("btnp,nrp->btnrp", block.value(x).unflatten(-1, (-1, P)), mimo_x)
    z = torch.einsum("btnp,nrp->btnrp", block.gate(x).unflatten(-1, (-1, P)), mimo_z)
    angle = x.new_zeros(len(x), N, theta.shape[-1])
    h, outputs = x.new_zeros(len(x), N, P, S), []
    k_before, v_before = x.new_zeros(len(x), N, R, S), torch.zeros_like(v[:, 0])
    for t in range(x.shape[1]):
        angle = angle + theta[:, t, None] * dt[:, t, :, None]
        q, k = turned(C[:, t], angle), turned(B[:, t], angle)
        alpha = (A[:, t] * dt[:, t]).exp()
        beta, gamma = (1 - trap[:, t]) * dt[:, t] * alpha, trap[:, t] * dt[:, t]
        h = alpha[..., None, None] * h
        h = h + beta[..., None, None] * torch.einsum("bnrd,bnrp->bnpd", k_before, v_before)
        h = h + gamma[..., None, None] * torch.einsum("bnrd,bnrp->bnpd", k, v[:, t])
        y = torch.einsum("bnpd,bnrd->bnrp", h, q) + block.skip[:, None, None] * v[:, t]
        outputs.append(torch.einsum("bnrp,nrp->bnp", y * F.silu(z[:, t]), mimo_o))
        k_before, v_before = k, v[:, t]
    return block.output(torch.stack(outputs, 1).flatten(2))


def convolved(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A causal convolution of each channel over time."""
    return F.conv1d(F.pad(u.mT, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight)).mT


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def normalised(y: Tensor, eps: float = 1e-6) -> Tensor:
    return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs as complex numbers, times e^{iθ}."""
    pairs = angle.shape[-1]
    turned = torch.view_as_complex(x[..., : 2 * pairs].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)[..., None, :]
    return torch.cat((torch.view_as_real(turned).flatten(-2), x[..., 2 * pairs :]), -1)


FORMULAS: dict[str, Formula] = {
    "delta_product": delta_product,
    "erase_then_delta": erase_then_delta,
    "momentum_delta": momentum_delta,
    "preconditioned_delta": preconditioned,
    "preconditioned_kda": preconditioned,
    "gated_delta_2": gated_delta_2,
    "rwkv7": rwkv7,
    "log_linear_mamba2": log_linear_mamba2,
    "mamba3": mamba3,
}


def made(make_block: Make, case: str, dtype: torch.dtype, layer: int = 1) -> tuple[Recurrent, Formula, Tensor, Any]:
    """A block, its formula, inputs, and the first layer's values where it mixes them in."""
    name = case.partition(",")[0]
    block = make_block("attention", {"name": name, **NODES[case]}, d_model=D, layer_idx=layer, dtype=dtype)
    x = drawn(2, T, D, dtype=dtype, seed=1)
    first = drawn(2, T, 3, 7, dtype=dtype, seed=2) if name == "rwkv7" else None
    return block, FORMULAS[name], x, first if layer else None


def carried(first: Tensor | None) -> dict[str, Tensor]:
    return {} if first is None else {"rwkv7.values": first}


def some(first: Tensor | None, tokens: slice) -> Tensor | None:
    return None if first is None else first[:, tokens]


def whole(block: Recurrent, x: Tensor, first: Tensor | None, segments: Tensor | None = None) -> Tensor:
    return block(x, Pass(order(x.shape[1]), segments, carry=carried(first)))


@pytest.mark.parametrize("case", NODES)
def test_block_and_its_gradients_are_the_formula(make_block: Make, case: str) -> None:
    for dtype, bound in TIGHT.items():
        block, formula, x, first = made(make_block, case, dtype)
        with torch.set_grad_enabled(dtype == torch.float64):
            inputs = [x.requires_grad_(), *block.parameters(), *([] if first is None else [first.requires_grad_()])]
            right, found = formula(block, x, first), whole(block, x, first)
        assert float(((found - right).abs().max() / right.abs().max()).detach()) < bound
        if dtype == torch.float64:
            for got, wanted in zip(gradients(found, inputs), gradients(right, inputs), strict=True):
                assert wanted.abs().max() > 0
                near(got, wanted, 1e-8 * float(wanted.abs().max()), 1e-7)


@pytest.mark.parametrize("case", NODES)
@torch.no_grad()
def test_documents_are_each_alone(make_block: Make, case: str) -> None:
    block, formula, x, first = made(make_block, case, torch.float64)
    ends = [0, 1, 14, 15, 64, T]  # of one token, and across the border of a chunk
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor(ends).diff())[None].expand(2, -1)
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    right = torch.cat([formula(block, x[:, part], some(first, part)) for part in parts], 1)
    found = whole(block, x, first, segments)
    near(found, right, 1e-9 * float(right.abs().max()))


@pytest.mark.parametrize("case", NODES)
@torch.no_grad()
def test_cache_token_by_token_in_parts_and_rewound_is_the_formula(make_block: Make, case: str) -> None:
    block, formula, x, first = made(make_block, case, torch.float64)
    right = formula(block, x, first)
    exact = 1e-9 * float(right.abs().max())

    def read(cache: Any, n: int) -> Tensor:
        part = slice(cache.length, cache.length + n)
        return block(x[:, part], Pass(order(n, part.start), cache=cache, carry=carried(some(first, part))))

    for pieces in ([1] * 19, [17, 1, 1, 52], [64, 7]):
        cache = block.new_cache(2, T, torch.float64, x.device)
        found = torch.cat([read(cache, n) for n in pieces], 1)
        near(found, right[:, : sum(pieces)], exact)
    cache = block.new_cache(2, T, torch.float64, x.device)
    read(cache, 9)
    for keep in (0, 2, 5):
        start, mark = cache.length, cache.mark(5)
        tried = read(cache, 5)
        near(tried, right[:, start : start + 5], exact)
        cache.rewind(mark, keep)
    found = read(cache, 11)
    near(found, right[:, 16:27], exact)


@torch.no_grad()
def test_layer_zero_leaves_its_values_and_has_no_others_to_mix(make_block: Make) -> None:
    block, formula, x, _ = made(make_block, "rwkv7", torch.float64, layer=0)
    carry: dict[str, Tensor] = {}
    near(block(x, Pass(order(T), carry=carry)), formula(block, x, None), 1e-9)
    assert carry["rwkv7.values"].shape == (2, T, 3, 7) and not hasattr(block, "first_up")


def test_rwkv7_begins_as_its_release(tiny: Make) -> None:
    """The values of ``_initialize_weights`` in flash-linear-attention, written as its loop writes them."""
    model = compose(tiny(n_layers=3, attention={"name": "rwkv7", "n_heads": 4}), seed=0)
    block, layer, layers, width, H = model.layers[1].attention, 1, 3, 48, 12
    for n in range(width):
        zigzag = (n % H - (H - 1) / 2) / ((H - 1) / 2)
        zigzag, linear = zigzag * abs(zigzag), n / (width - 1) - 0.5
        www = -6 + 6 * (n / (width - 1)) ** (1 + (layer / (layers - 1)) ** 0.3)
        right = {
            "decay_up.bias": www + 0.5 + zigzag * 2.5,
            "rate_up.bias": -0.19 + zigzag * 0.3 + linear * 0.4,
            "first_up.bias": 0.73 - linear * 0.4,
            "erased": 0.71 - linear * 0.1,
            "learned": 1.02,
            "bonus": -0.04,
            "weight": (2 / 3) ** 0.7,
            "bias": 0.0,
            "shift_query": 1 - (n / width) ** (0.2 * (1 - layer / layers)),
            "shift_value": 1 - (n / width) ** (0.7 * (1 - layer / layers)),
            "shift_rate": 1 - (n / width) ** (0.9 * (1 - layer / layers)),
        }
        for name, value in right.items():
            assert block.get_parameter(name)[n].item() == pytest.approx(value, abs=2e-6), (name, n)


@torch.no_grad()
def test_angles_do_not_lose_their_bits_over_many_turns(make_block: Make) -> None:
    block = make_block("attention", {"name": "mamba3", **NODES["mamba3"]}, d_model=D, dtype=torch.float32)
    x = drawn(1, 20_000, D, dtype=torch.float32)
    steps = F.softplus(block.time(x) + block.time_bias) * 30
    found = block._angles(x, steps, None)[0, -1].double()
    exact = (block.angle(x).tanh()[:, :, None] * steps[..., None] * math.pi).double().sum(1)[0]
    assert (found - exact).sin().abs().max() < 1e-5 < 1e5 < exact.abs().max()


def test_bytes_of_the_states_are_their_formulas(make_block: Make) -> None:
    numbers = {
        "delta_product": 4 * 5 * 7 + 2 * (10 + 3 * 10 + 3 * 28),
        "erase_then_delta": 3 * 5 * 7 + 2 * (15 + 15 + 21),
        "momentum_delta": 4 * 10 * 7 + 2 * (10 + 10 + 28),
        "preconditioned_delta": 4 * 5 * 7 + 2 * 5 + 2 * (10 + 10 + 28),
        "gated_delta_2": 3 * 5 * 7 + 2 * (15 + 15 + 21),
        "rwkv7": 3 * 7 * 7 + D,
        "log_linear_mamba2": 8 * 4 * 3 * 5 + 2 * (20 + 6 + 6),
        "mamba3, three ranks": 4 * 6 * 3 + 4 * 3 * 6 + 4 * 3 + 4 * 3,
    }
    for case, count in numbers.items():
        block, *_ = made(make_block, case, torch.float32)
        for length in (1, 9_000):
            assert block.new_cache(2, length, torch.float32, torch.device("cpu"), bits=4).nbytes == 2 * count * 4


def test_layers_of_other_heads_cannot_share_first_values(tiny: Make) -> None:
    variants = {"attention": {"narrow": {"name": "rwkv7", "n_heads": 2}}}
    model = tiny(attention={"name": "rwkv7", "n_heads": 4}, variants=variants, layout={"attention": "attention narrow"})
    with pytest.raises(BlockError, match="Give all layers of rwkv7 the same heads"):
        compose(model, device="meta")(torch.zeros(1, 3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    ("name", "child"),
    [("momentum_delta", "decay"), ("momentum_delta", "momentum"), ("preconditioned_kda", "curvature")],
)
def test_what_is_computed_by_head_does_not_decay_by_channel(tiny: Make, name: str, child: str) -> None:
    with pytest.raises(ConfigError, match=f"Use {child}: head"):
        compose(tiny(attention={"name": name, "n_heads": 4, child: {"name": "channel"}}))


# --- earlier ones -----------------------------------------------------------------------------------------------------

LATER = (
    "delta_product",
    "erase_then_delta",
    "preconditioned_delta",
    "preconditioned_kda",
    "gated_delta_2",
    "rwkv7",
    "mamba3",
)
OTHERS = ("gated_delta", "kda", "mamba2", "lightning", "short_conv", "none", "averaging")


@pytest.mark.parametrize("name", ["gated_delta", "kda"])
def test_delta_rule_is_the_papers(make_block: Make, name: str) -> None:
    sizes = {"n_heads": 6, "head_dim": 5, "v_head_dim": 7, "taps": 3, "negative_eigenvalues": name == "gated_delta"}
    shared = {"n_key_heads": 3} if name == "gated_delta" else {}
    block = make_block("attention", {"name": name, **sizes, **shared}, d_model=D)
    x = drawn(2, N, D)
    q, k, v = (F.silu(convolved(block.get_submodule(n)(x), block.get_submodule(f"{n}_conv").weight))
               for n in ("query", "key", "value"))  # fmt: skip
    q, k = (unit(t.unflatten(-1, (-1, 5))).repeat_interleave(2 if shared else 1, 2) for t in (q, k))
    v, beta = v.unflatten(-1, (6, 7)), block.strength(x).sigmoid() * (2 if shared else 1)
    decay, rate = block.decay, block.decay.log_rate.exp()
    if name == "gated_delta":
        g = (-rate * F.softplus(decay.project(x) + decay.bias))[..., None].expand_as(k)
        gate = F.silu(block.output_gate.project(x))
    else:
        g = -rate[:, None] * F.softplus(decay.up(decay.down(x)) + decay.bias).view(2, N, 6, 5)
        gate = block.output_gate.up(block.output_gate.down(x)).sigmoid()
    S, outputs = torch.zeros(2, 6, 5, 7, dtype=torch.float64), []
    for t in range(N):
        S = g[:, t].exp()[..., None] * S
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bnkv,bnk->bnv", S, k[:, t]))
        S = S + torch.einsum("bnk,bnv->bnkv", k[:, t], error)
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]) / 5**0.5)
    y = normalised(torch.stack(outputs, 1)) * block.norm.weight
    right = block.output((y * gate.view_as(y)).flatten(2))
    near(block(x, Pass(order(N))), right, 1e-10)


@pytest.mark.parametrize(
    ("name", "given", "least", "most"),
    [("head", {}, 1e-3, 0.1), ("channel", {"least_step": 1e-5, "most_step": 1e-3}, 1e-5, 1e-3)],
)
def test_first_time_steps_are_log_uniform_in_their_range(
    name: str, given: dict[str, float], least: float, most: float
) -> None:
    attention = {"name": "gated_delta", "n_heads": 256, "decay": {"name": name, **given}}
    made = decoder(torch.float32, vocab_size=8, d_model=512, n_layers=1, ffn="none", attention=attention)
    steps = F.softplus(made.layers[0].attention.decay.bias.double())
    assert least * 0.999 <= steps.min() < least * 1.2 and most / 1.2 < steps.max() <= most * 1.001
    assert steps.log().mean().exp().item() == pytest.approx((least * most) ** 0.5, rel=0.25)


def test_mamba2_is_the_papers_state_space_model(make_block: Make) -> None:
    node = {"name": "mamba2", "n_heads": 6, "head_dim": 7, "state_dim": 5, "n_groups": 2, "least_step": 0.3}
    block = make_block("attention", node, d_model=D)
    x = drawn(2, N, D)
    v, k, q = (
        F.silu(convolved(block.get_submodule(n)(x), c.weight, c.bias))
        for n in ("value", "key", "query")
        for c in (block.get_submodule(f"{n}_conv"),)
    )
    v, k, q = v.view(2, N, 6, 7), *(t.view(2, N, 2, 5).repeat_interleave(3, 2) for t in (k, q))
    steps = F.softplus(block.time(x) + block.time_bias).clamp(min=0.3)
    S, outputs = torch.zeros(2, 6, 5, 7, dtype=torch.float64), []
    for t in range(N):
        kept = (-steps[:, t] * block.log_rate.exp()).exp()
        S = kept[..., None, None] * S + torch.einsum("bnk,bnv,bn->bnkv", k[:, t], v[:, t], steps[:, t])
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]) + block.skip[:, None] * v[:, t])
    y = (torch.stack(outputs, 1).flatten(2) * F.silu(block.gate(x))).unflatten(-1, (2, 21))
    right = block.output(normalised(y, 1e-5).flatten(2) * block.weight)
    near(block(x, Pass(order(N))), right, 1e-10)


def test_lightning_decays_each_head_at_a_fixed_rate(make_block: Make) -> None:
    node = {"name": "lightning", "n_heads": 3, "head_dim": 5}
    block = make_block("attention", node, d_model=D, layer_idx=1, n_layers=5)
    x = drawn(2, N, D)
    q, k, v = (F.silu(p(x)).view(2, N, 3, 5) for p in (block.query, block.key, block.value))
    rates = torch.tensor([2 ** (-8 * n / 3) * (1 - 1 / (4 + 1e-5) + 1e-5) for n in (1, 2, 3)], dtype=torch.float64)
    lag = torch.arange(N)[:, None] - torch.arange(N)
    weights = (-lag * rates[:, None, None]).exp().tril()
    y = torch.einsum("btnk,bsnk,nts,bsnv->btnv", q, k, weights, v).flatten(2)
    gate = block.output_gate.project(x).sigmoid()
    right = block.output(normalised(y) * block.norm.weight * gate)
    near(block(x, Pass(order(N))), right, 1e-10)


def test_short_convolution_is_gated_on_both_sides(make_block: Make) -> None:
    block = make_block("attention", {"name": "short_conv", "taps": 4, "bias": True}, d_model=D)
    x = drawn(2, N, D)
    y = convolved(block.input(x) * block.value(x), block.value_conv.weight, block.value_conv.bias)
    right = block.output(block.gate(x) * y)
    near(block(x, Pass(order(N))), right, 1e-10)


# --- beside attention -------------------------------------------------------------------------------------------------

LINEAR = {
    "kda": {"name": "kda", "n_heads": 3, "head_dim": 4},
    "mamba": {"name": "mamba2", "n_heads": 4, "state_dim": 4},
}


def test_hybrid_generates_with_caches_of_two_kinds_whose_bytes_are_formulas_what_it_computes_without(
    tiny: Make,
) -> None:
    """Three recurrent layers to one of latent attention."""
    layout = {"attention": "kda*3 attention"}
    model = tiny(n_layers=4, attention={"name": "mla", "n_heads": 4}, variants={"attention": LINEAR}, layout=layout)
    decoder, prompts = compose(model).eval(), [[5, 9, 2, 44, 7, 8], [3, 1]]
    found = [list(t) for t in zip(*Continuations(decoder, prompts, 8, seed=3, bits=8), strict=True)]
    alone = [[t for (t,) in Continuations(decoder, [p], 8, seed=3 + i, bits=8)] for i, p in enumerate(prompts)]
    assert found == alone
    for length in (1, 64, 10_000):
        state, *_, latents = decoder.new_caches(2, length)
        assert state.nbytes == 2 * (3 * 4 * 4 * 4 + 3 * (3 * 4) * 3 * 4)  # N·K·V, and three tails of taps − 1 inputs
        assert latents.nbytes == 2 * length * (48 + 6) * 4


@pytest.mark.parametrize("linear", ["kda", "mamba"])
def test_rewound_caches_of_every_kind_continue_as_if_nothing_had_been_tried(tiny: Make, linear: str) -> None:
    window = {"name": "sliding_window", "n_heads": 4, "window": 3}
    variants, layout = {"attention": {**LINEAR, "ring": window}}, {"attention": f"attention ring {linear}"}
    decoder, tokens = compose(tiny(n_layers=3, variants=variants, layout=layout)).eval(), ids(17)
    with torch.no_grad():
        right, caches = decoder.hidden(tokens)[0], decoder.new_caches(2, 17)
        decoder(tokens[:, :9], caches=caches)
        marks = [cache.mark() for cache in caches]
        for _ in range(2):  # a mark stays valid
            decoder(tokens[:, 2:8], caches=caches)
            rewind(caches, marks)
        near(in_parts(decoder, tokens[:, 9:], [1] * 8, caches), right[:, 9:], 1e-5)


@pytest.mark.parametrize("name", ["gated_delta", "kda", "mamba2", "lightning", *LATER])
def test_under_autocast_the_recurrence_stays_in_fp32(tiny: Make, name: str) -> None:
    decoder, tokens = compose(tiny(attention={"name": name}, n_layers=1)), ids(13)
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder.nll(decoder.hidden(tokens)[0], tokens)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    assert loss.item() == pytest.approx(decoder.nll(decoder.hidden(tokens)[0], tokens).item(), rel=0.02)


# --- drafts -----------------------------------------------------------------------------------------------------------


class Averaging(Recurrent):
    """A plug-in's mixer: the mean of all tokens, whose state is given after the last token alone."""

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"sum": (48,), "count": (1,)}

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        total, count = x.cumsum(1), torch.ones_like(x[..., :1]).cumsum(1)
        if held is not None:
            total, count = total + held.held["sum"][:, None], count + held.held["count"][:, None]
        return total / count, {"sum": total[:, -1], "count": count[:, -1]}


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    each([*OTHERS, *LATER], [torch.float64, torch.float32, torch.bfloat16], [1e-13, 2e-6, 0.05]),
)
@torch.inference_mode()
def test_first_tokens_of_a_pass_are_kept_as_if_the_others_had_not_been_read(
    tiny: Make, name: str, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    block = Averaging() if name == "averaging" else compose(tiny(attention={"name": name}), seed=3).layers[1].attention
    block, x = block.to(dtype).eval(), torch.randn(3, 11, 48).to(dtype)
    padding = torch.tensor([0, 4, 2])

    def read(n: int, cache: State) -> Tensor:
        return block(x[:, cache.length : cache.length + n], Pass(order(n), cache=cache))

    for kept in (0, 1, 2, 3, torch.tensor([3, 0, 1])):
        cache = block.new_cache(3, 20, dtype, x.device)
        cache.padding = padding
        read(5, cache)
        mark = cache.mark(3)
        found = read(3, cache)
        cache.rewind(mark, kept)
        for row in range(3):
            alone = block.new_cache(3, 20, dtype, x.device)
            alone.padding = padding
            read(5, alone)
            right = [read(1, alone) for _ in range(kept if isinstance(kept, int) else int(kept[row]))]
            if right:
                y = torch.cat(right, 1)[row]
                near(found[row, : len(y)], y, bound)
            for part, values in alone.buffers.items():
                near(cache.buffers[part][row], values[row], bound)


def test_projections_are_computed_once_for_all_tokens_of_a_pass(make_block: Make) -> None:
    block = make_block("attention", {"name": "gated_delta", "n_heads": 6, "head_dim": 5}, d_model=D)
    calls = []
    block.query.register_forward_hook(lambda *call: calls.append(call[1][0].shape[1]))
    cache = block.new_cache(1, 9, torch.float64, torch.device("cpu"))
    cache.mark(3)
    with torch.no_grad():
        block(drawn(1, 3, D), Pass(order(3), cache=cache))
    assert calls == [3]
