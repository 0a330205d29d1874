"""Recurrent mixers against their formulas, token by token, and beside attention in one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.cache.state import State
from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import Continuations
from blockwright.registry import ConfigError

D, T = 30, 19
LATER = ("gated_delta_2", "rwkv7", "mamba3")
OTHERS = ("gated_delta", "kda", "mamba2", "lightning", "short_conv", "none", "averaging")
Make = Callable[..., Any]


def convolved(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A causal convolution of each channel over time."""
    taps = weight.shape[1]
    padded = torch.cat((u.new_zeros(u.shape[0], taps - 1, u.shape[2]), u), 1)
    return sum(padded[:, i : i + u.shape[1]] * weight[:, i] for i in range(taps)) + (0 if bias is None else bias)


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def normalised(y: Tensor, eps: float = 1e-6) -> Tensor:
    return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("name", ["gated_delta", "kda"])
def test_delta_rule_is_the_papers(make_block: Make, name: str) -> None:
    sizes = {"n_heads": 6, "head_dim": 5, "v_head_dim": 7, "taps": 3, "negative_eigenvalues": name == "gated_delta"}
    shared = {"n_key_heads": 3} if name == "gated_delta" else {}
    block = make_block("attention", {"name": name, **sizes, **shared}, d_model=D)
    x = torch.randn(2, T, D, dtype=torch.float64)
    q, k, v = (F.silu(convolved(block.get_submodule(n)(x), block.get_submodule(f"{n}_conv").weight))
               for n in ("query", "key", "value"))  # fmt: skip
    q, k = (unit(t.unflatten(-1, (-1, 5))).repeat_interleave(2 if shared else 1, 2) for t in (q, k))
    v, beta = v.unflatten(-1, (6, 7)), block.strength(x).sigmoid() * (2 if shared else 1)
    decay, rate = block.decay, block.decay.log_rate.exp()
    if name == "gated_delta":
        g = (-rate * F.softplus(decay.project(x) + decay.bias))[..., None].expand_as(k)
        gate = F.silu(block.output_gate.project(x))
    else:
        g = -rate[:, None] * F.softplus(decay.up(decay.down(x)) + decay.bias).view(2, T, 6, 5)
        gate = block.output_gate.up(block.output_gate.down(x)).sigmoid()
    S, outputs = torch.zeros(2, 6, 5, 7, dtype=torch.float64), []
    for t in range(T):
        S = g[:, t].exp()[..., None] * S
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bnkv,bnk->bnv", S, k[:, t]))
        S = S + torch.einsum("bnk,bnv->bnkv", k[:, t], error)
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]) / 5**0.5)
    y = normalised(torch.stack(outputs, 1)) * block.norm.weight
    right = block.output((y * gate.view_as(y)).flatten(2))
    torch.testing.assert_close(block(x, Pass(torch.arange(T)[None])), right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["head", "channel"])
@pytest.mark.parametrize(
    ("given", "least", "most"), [({}, 1e-3, 0.1), ({"least_step": 1e-5, "most_step": 1e-3}, 1e-5, 1e-3)]
)
def test_first_time_steps_are_log_uniform_in_their_range(
    name: str, given: dict[str, float], least: float, most: float
) -> None:
    model = {"vocab_size": 8, "d_model": 512, "n_layers": 1, "max_positions": 8, "ffn": "none", "norm": "rmsnorm"}
    decay = {"name": name, **given}
    attention = {"name": "gated_delta", "n_heads": 256, "decay": decay}
    model = compose({**model, "attention": attention, "position": "none", "residual": "prenorm"})
    steps = F.softplus(model.layers[0].attention.decay.bias.double())
    assert least * 0.999 <= steps.min() < least * 1.2 and most / 1.2 < steps.max() <= most * 1.001
    assert steps.log().mean().exp().item() == pytest.approx((least * most) ** 0.5, rel=0.25)


def test_range_of_time_steps_the_wrong_way_round_is_refused(make_block: Make) -> None:
    with pytest.raises(ConfigError, match="must be at most most_step"):
        make_block("decay", {"name": "head", "least_step": 0.2}, d_model=D, n_heads=2, head_dim=4)


def test_mamba2_is_the_papers_state_space_model(make_block: Make) -> None:
    node = {"name": "mamba2", "n_heads": 6, "head_dim": 7, "state_dim": 5, "n_groups": 2, "least_step": 0.3}
    block = make_block("attention", node, d_model=D)
    x = torch.randn(2, T, D, dtype=torch.float64)
    v, k, q = (
        F.silu(convolved(block.get_submodule(n)(x), c.weight, c.bias))
        for n in ("value", "key", "query")
        for c in (block.get_submodule(f"{n}_conv"),)
    )
    v, k, q = v.view(2, T, 6, 7), *(t.view(2, T, 2, 5).repeat_interleave(3, 2) for t in (k, q))
    steps = F.softplus(block.time(x) + block.time_bias).clamp(min=0.3)
    S, outputs = torch.zeros(2, 6, 5, 7, dtype=torch.float64), []
    for t in range(T):
        kept = (-steps[:, t] * block.log_rate.exp()).exp()
        S = kept[..., None, None] * S + torch.einsum("bnk,bnv,bn->bnkv", k[:, t], v[:, t], steps[:, t])
        outputs.append(torch.einsum("bnkv,bnk->bnv", S, q[:, t]) + block.skip[:, None] * v[:, t])
    y = (torch.stack(outputs, 1).flatten(2) * F.silu(block.gate(x))).unflatten(-1, (2, 21))
    right = block.output(normalised(y, 1e-5).flatten(2) * block.weight)
    torch.testing.assert_close(block(x, Pass(torch.arange(T)[None])), right, rtol=0, atol=1e-10)


def test_lightning_decays_each_head_at_a_fixed_rate(make_block: Make) -> None:
    node = {"name": "lightning", "n_heads": 3, "head_dim": 5}
    block = make_block("attention", node, d_model=D, layer_idx=1, n_layers=5)
    x = torch.randn(2, T, D, dtype=torch.float64)
    q, k, v = (F.silu(p(x)).view(2, T, 3, 5) for p in (block.query, block.key, block.value))
    rates = torch.tensor([2 ** (-8 * n / 3) * (1 - 1 / (4 + 1e-5) + 1e-5) for n in (1, 2, 3)], dtype=torch.float64)
    lag = torch.arange(T)[:, None] - torch.arange(T)
    weights = (-lag * rates[:, None, None]).exp().tril()
    y = torch.einsum("btnk,bsnk,nts,bsnv->btnv", q, k, weights, v).flatten(2)
    gate = block.output_gate.project(x).sigmoid()
    right = block.output(normalised(y) * block.norm.weight * gate)
    torch.testing.assert_close(block(x, Pass(torch.arange(T)[None])), right, rtol=0, atol=1e-10)


def test_short_convolution_is_gated_on_both_sides(make_block: Make) -> None:
    block = make_block("attention", {"name": "short_conv", "taps": 4, "bias": True}, d_model=D)
    x = torch.randn(2, T, D, dtype=torch.float64)
    y = convolved(block.input(x) * block.value(x), block.value_conv.weight, block.value_conv.bias)
    right = block.output(block.gate(x) * y)
    torch.testing.assert_close(block(x, Pass(torch.arange(T)[None])), right, rtol=0, atol=1e-10)


# --- beside attention -------------------------------------------------------------------------------------------------

LINEAR = {
    "kda": {"name": "kda", "n_heads": 3, "head_dim": 4},
    "mamba": {"name": "mamba2", "n_heads": 4, "state_dim": 4},
}


def hybrid(tiny: Callable[..., Any], linear: str) -> Any:
    """Three recurrent layers to one of latent attention."""
    layout = {"attention": f"{linear}*3 attention"}
    model = tiny(n_layers=4, attention={"name": "mla", "n_heads": 4}, variants={"attention": LINEAR}, layout=layout)
    return compose(model).eval()


@pytest.mark.parametrize("bits", [8])
def test_hybrid_generates_with_caches_of_two_kinds_what_it_computes_without(
    tiny: Callable[..., Any], bits: int | None
) -> None:
    decoder = hybrid(tiny, "kda")
    prompts = [[5, 9, 2, 44, 7, 8], [3, 1]]
    found = [list(t) for t in zip(*Continuations(decoder, prompts, 12, seed=3, bits=bits), strict=True)]
    alone = [[t for (t,) in Continuations(decoder, [p], 12, seed=3 + i, bits=bits)] for i, p in enumerate(prompts)]
    assert found == alone
    caches = decoder.new_caches(1, 64, bits)
    assert [type(c).__name__ for c in caches] == ["State"] * 3 + ["Cache"]


def test_bytes_of_a_state_are_its_formula_at_every_length(tiny: Callable[..., Any]) -> None:
    decoder = hybrid(tiny, "kda")
    for length in (1, 64, 10_000):
        state, *_, latents = decoder.new_caches(2, length)
        assert state.nbytes == 2 * (3 * 4 * 4 * 4 + 3 * (3 * 4) * 3 * 4)  # N·K·V, and three tails of taps − 1 inputs
        assert latents.nbytes == 2 * length * (48 + 6) * 4


@pytest.mark.parametrize("linear", ["kda", "mamba"])
def test_rewound_caches_of_every_kind_continue_as_if_nothing_had_been_tried(
    tiny: Callable[..., Any], linear: str
) -> None:
    window = {"name": "sliding_window", "n_heads": 4, "window": 3}
    model = tiny(
        n_layers=3, variants={"attention": {**LINEAR, "ring": window}}, layout={"attention": f"attention ring {linear}"}
    )
    decoder = compose(model).eval()
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = decoder(tokens)
        caches = decoder.new_caches(2, 17)
        decoder(tokens[:, :9], caches=caches)
        marks = [cache.mark() for cache in caches]
        for _ in range(2):  # a mark stays valid
            decoder(tokens[:, 2:8], caches=caches)
            for cache, mark in zip(caches, marks, strict=True):
                cache.rewind(mark)
        found = torch.cat([decoder(part, caches=caches) for part in tokens[:, 9:].split(1, 1)], 1)
    torch.testing.assert_close(found, right[:, 9:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gated_delta", "kda", "mamba2", "lightning", *LATER])
def test_under_autocast_the_recurrence_stays_in_fp32(tiny: Callable[..., dict[str, Any]], name: str) -> None:
    decoder = compose(tiny(attention={"name": name}), seed=0)
    ids = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder.nll(decoder.hidden(ids)[0], ids)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    whole = decoder.nll(decoder.hidden(ids)[0], ids)
    assert loss.item() == pytest.approx(whole.item(), rel=0.02)


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
    tiny: Callable[..., Any], name: str, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    block = Averaging() if name == "averaging" else compose(tiny(attention={"name": name}), seed=3).layers[1].attention
    block, x = block.to(dtype).eval(), torch.randn(3, 11, 48).to(dtype)
    padding = torch.tensor([0, 4, 2])

    def read(n: int, cache: State) -> Tensor:
        tokens = x[:, cache.length : cache.length + n]
        return block(tokens, Pass(torch.arange(n)[None], cache=cache))

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
                torch.testing.assert_close(found[row, : len(y)], y, rtol=0, atol=bound)
            for part, values in alone.buffers.items():
                torch.testing.assert_close(cache.buffers[part][row], values[row], rtol=0, atol=bound)


def test_projections_are_computed_once_for_all_tokens_of_a_pass(make_block: Make) -> None:
    block = make_block("attention", {"name": "gated_delta", "n_heads": 6, "head_dim": 5}, d_model=D)
    calls = []
    block.query.register_forward_hook(lambda *call: calls.append(call[1][0].shape[1]))
    cache = block.new_cache(1, 9, torch.float64, torch.device("cpu"))
    cache.mark(3)
    with torch.no_grad():
        block(torch.randn(1, 3, D, dtype=torch.float64), Pass(torch.arange(3)[None], cache=cache))
    assert calls == [3]
