"""Gated DeltaNet-2, RWKV-7 and Mamba-3 against their authors' formulas, written token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.compose import check, compose
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError, ConfigError

D, T = 30, 71  # more than a chunk, and no multiple of one
Make = Callable[..., Any]
Formula = Callable[..., Tensor]
TIGHT = {torch.float64: 1e-9, torch.float32: 3e-4}
NODES: dict[str, dict[str, Any]] = {
    "gated_delta_2": {"n_heads": 3, "head_dim": 5, "v_head_dim": 7, "taps": 3},
    "gated_delta_2, negative": {"n_heads": 2, "head_dim": 7, "v_head_dim": 3, "negative_eigenvalues": True},
    "rwkv7": {"n_heads": 3, "head_dim": 7, "decay_rank": 5, "rate_rank": 3, "value_rank": 4, "gate_rank": 6},
    "mamba3": {"n_heads": 6, "head_dim": 5, "state_dim": 9, "n_groups": 2},
    "mamba3, three ranks": {"n_heads": 4, "head_dim": 3, "state_dim": 6, "n_groups": 2, "rank": 3, "rotated": 1.0},
}


def gated_delta_2(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """``naive_recurrent_gdn2`` and the layer around it (flash-linear-attention, after NVlabs/GatedDeltaNet-2)."""
    K, V = block.head_dim, block.v_head_dim
    q, k, v = (F.silu(_convolved(block.get_submodule(n)(x), block.get_submodule(f"{n}_conv").weight))
               for n in ("query", "key", "value"))  # fmt: skip
    q, k = (_unit(t.unflatten(-1, (-1, K))) for t in (q, k))
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


def mamba3(block: Any, x: Tensor, first: Tensor | None) -> Tensor:
    """``mamba3_MIMO_step_ref`` of state-spaces/mamba, and the layer around it; of one rank ``mamba3_siso_step_ref``."""
    P, S, R = block.head_dim, block.state_dim, block.rank
    N = block.value.out_features // P
    ones = x.new_ones(N, R, P)
    mimo_x, mimo_z, mimo_o = (
        ones if f is None else f.view(N, R, P) for f in (block.spread, block.gate_spread, block.joined)
    )
    B, C = (_rms(p(x).view(*x.shape[:2], -1, R, S), w, block.eps).repeat_interleave(block.shared_by, 2)
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
        q, k = _turned(C[:, t], angle), _turned(B[:, t], angle)
        alpha = (A[:, t] * dt[:, t]).exp()
        beta, gamma = (1 - trap[:, t]) * dt[:, t] * alpha, trap[:, t] * dt[:, t]
        h = alpha[..., None, None] * h
        h = h + beta[..., None, None] * torch.einsum("bnrd,bnrp->bnpd", k_before, v_before)
        h = h + gamma[..., None, None] * torch.einsum("bnrd,bnrp->bnpd", k, v[:, t])
        y = torch.einsum("bnpd,bnrd->bnrp", h, q) + block.skip[:, None, None] * v[:, t]
        outputs.append(torch.einsum("bnrp,nrp->bnp", y * F.silu(z[:, t]), mimo_o))
        k_before, v_before = k, v[:, t]
    return block.output(torch.stack(outputs, 1).flatten(2))


def _convolved(u: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(F.pad(u.mT, (weight.shape[1] - 1, 0)), weight[:, None], groups=len(weight)).mT


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs as complex numbers, times e^{iθ}."""
    pairs = angle.shape[-1]
    turned = torch.view_as_complex(x[..., : 2 * pairs].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)[..., None, :]
    return torch.cat((torch.view_as_real(turned).flatten(-2), x[..., 2 * pairs :]), -1)


FORMULAS: dict[str, Formula] = {"gated_delta_2": gated_delta_2, "rwkv7": rwkv7, "mamba3": mamba3}


def made(make_block: Make, case: str, dtype: torch.dtype, layer: int = 1) -> tuple[Recurrent, Formula, Tensor, Any]:
    """A block, its formula, inputs, and the first layer's values where it mixes them in."""
    name = case.partition(",")[0]
    block = make_block("attention", {"name": name, **NODES[case]}, d_model=D, layer_idx=layer, dtype=dtype)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(2, T, D, generator=draws, dtype=torch.float64).to(dtype)
    first = torch.randn(2, T, 3, 7, generator=draws, dtype=torch.float64).to(dtype) if name == "rwkv7" else None
    return block, FORMULAS[name], x, first if layer else None


def carried(first: Tensor | None) -> dict[str, Tensor]:
    return {} if first is None else {"rwkv7.values": first}


def some(first: Tensor | None, tokens: slice, row: slice = slice(None)) -> Tensor | None:
    return None if first is None else first[row, tokens]


def whole(block: Recurrent, x: Tensor, first: Tensor | None, segments: Tensor | None = None) -> Tensor:
    return block(x, Pass(torch.arange(x.shape[1])[None], segments, carry=carried(first)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", NODES)
def test_block_and_its_gradients_are_the_formula(make_block: Make, case: str, dtype: torch.dtype) -> None:
    block, formula, x, first = made(make_block, case, dtype)
    inputs = [x.requires_grad_(), *block.parameters(), *([] if first is None else [first.requires_grad_()])]
    weights = torch.randn(2, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    right = formula(block, x, first)
    found = whole(block, x, first)
    assert float((found - right).abs().max() / right.abs().max()) < TIGHT[dtype]
    if dtype == torch.float64:
        grads = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, right)]
        for got, wanted in zip(*grads, strict=True):
            assert wanted.abs().max() > 0
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("case", NODES)
@torch.no_grad()
def test_documents_are_each_alone(make_block: Make, case: str) -> None:
    block, formula, x, first = made(make_block, case, torch.float64)
    ends = [0, 1, 14, 15, 64, T]  # of one token, and across the border of a chunk
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor(ends).diff())[None].expand(2, -1)
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    right = torch.cat([formula(block, x[:, part], some(first, part)) for part in parts], 1)
    found = whole(block, x, first, segments)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-9 * float(right.abs().max()))


@pytest.mark.parametrize("case", NODES)
@torch.no_grad()
def test_cache_token_by_token_in_parts_and_rewound_is_the_formula(make_block: Make, case: str) -> None:
    block, formula, x, first = made(make_block, case, torch.float64)
    right = formula(block, x, first)

    def read(cache: Any, n: int) -> Tensor:
        part = slice(cache.length, cache.length + n)
        given = Pass(torch.arange(part.start, part.stop)[None], cache=cache, carry=carried(some(first, part)))
        return block(x[:, part], given)

    for pieces in ([1] * 19, [17, 1, 1, 52], [64, 7]):
        cache = block.new_cache(2, T, torch.float64, x.device)
        found = torch.cat([read(cache, n) for n in pieces], 1)
        torch.testing.assert_close(found, right[:, : sum(pieces)], rtol=0, atol=1e-9 * float(right.abs().max()))
    cache = block.new_cache(2, T, torch.float64, x.device)
    read(cache, 9)
    for keep in (0, 2, 5):
        start, mark = cache.length, cache.mark(5)
        tried = read(cache, 5)
        torch.testing.assert_close(tried, right[:, start : start + 5], rtol=0, atol=1e-9 * float(right.abs().max()))
        cache.rewind(mark, keep)
    found = read(cache, 11)
    torch.testing.assert_close(found, right[:, 16:27], rtol=0, atol=1e-9 * float(right.abs().max()))


@torch.no_grad()
def test_layer_zero_leaves_its_values_and_has_no_others_to_mix(make_block: Make) -> None:
    block, formula, x, _ = made(make_block, "rwkv7", torch.float64, layer=0)
    carry: dict[str, Tensor] = {}
    found = block(x, Pass(torch.arange(T)[None], carry=carry))
    torch.testing.assert_close(found, formula(block, x, None), rtol=0, atol=1e-9)
    assert carry["rwkv7.values"].shape == (2, T, 3, 7) and not hasattr(block, "first_up")


def test_rwkv7_begins_as_its_release(tiny: Callable[..., Any]) -> None:
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
    x = torch.randn(1, 20_000, D, generator=torch.Generator().manual_seed(0))
    steps = F.softplus(block.time(x) + block.time_bias) * 30
    found = block._angles(x, steps, None)[0, -1].double()
    exact = (block.angle(x).tanh()[:, :, None] * steps[..., None] * math.pi).double().sum(1)[0]
    assert (found - exact).sin().abs().max() < 1e-5 < 1e5 < exact.abs().max()


def test_bytes_of_the_states_are_their_formulas(make_block: Make) -> None:
    numbers = {
        "gated_delta_2": 3 * 5 * 7 + 2 * (15 + 15 + 21),
        "rwkv7": 3 * 7 * 7 + D,
        "mamba3, three ranks": 4 * 6 * 3 + 4 * 3 * 6 + 4 * 3 + 4 * 3,
    }
    for case, count in numbers.items():
        block, *_ = made(make_block, case, torch.float32)
        for length in (1, 9_000):
            assert block.new_cache(2, length, torch.float32, torch.device("cpu"), bits=4).nbytes == 2 * count * 4


@pytest.mark.parametrize(
    ("node", "path", "rule"),
    [
        ({"name": "gated_delta_2", "n_key_heads": 2}, "model.attention.n_key_heads", "n_key_heads"),
        ({"name": "gated_delta_2", "n_heads": 5}, "model.attention.n_heads", "must divide d_model"),
        ({"name": "rwkv7", "n_heads": 7}, "model.attention.n_heads", "must divide d_model"),
        ({"name": "rwkv7", "gate_rank": 0}, "model.attention.gate_rank", "at least 1"),
        ({"name": "mamba3", "n_heads": 6, "n_groups": 4}, "model.attention.n_groups", "must divide n_heads"),
        ({"name": "mamba3", "state_dim": 3, "rotated": 0.5}, "model.attention.rotated", "at least one pair"),
        ({"name": "mamba3", "rotated": 1.5}, "model.attention.rotated", "at most 1"),
        ({"name": "mamba3", "rank": 0}, "model.attention.rank", "at least 1"),
        ({"name": "mamba3", "least_step": 0.2}, "model.attention.least_step", "at most most_step"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_made(
    tiny: Callable[..., Any], node: dict[str, Any], path: str, rule: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check(tiny(attention=node))
    assert refusal.value.path == path and rule in str(refusal.value)


def test_layers_of_other_heads_cannot_share_first_values(tiny: Callable[..., Any]) -> None:
    variants = {"attention": {"narrow": {"name": "rwkv7", "n_heads": 2}}}
    model = tiny(attention={"name": "rwkv7", "n_heads": 4}, variants=variants, layout={"attention": "attention narrow"})
    with pytest.raises(BlockError, match="Give all layers of rwkv7 the same heads"):
        compose(model, device="meta")(torch.zeros(1, 3, dtype=torch.long, device="meta"))
