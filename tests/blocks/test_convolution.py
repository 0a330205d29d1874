"""Short convolutions against loops over tokens: alone, in the four places of Canon layers, and with every memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.layer import LayerCache
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import BlockError, ConfigError

T, LENGTHS, V = 13, (7, 1, 5), 61  # documents of a packed row
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
SLOW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "canon": lambda u, mixed: u + mixed,
    "silu": lambda u, mixed: mixed / (1 + (-mixed).exp()),
}


def slow(name: str, u: Tensor, weight: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """One token and one lag at a time, of documents u [B,T,W] one after another."""
    taps, mixed = weight.shape[1], torch.zeros_like(u)
    for first, last in zip(accumulated(lengths), accumulated(lengths)[1:], strict=False):
        for t in range(first, last):
            for lag in range(min(taps, t - first + 1)):
                mixed[:, t] = mixed[:, t] + weight[:, taps - 1 - lag] * u[:, t - lag]
    return SLOW[name](u, mixed)


def accumulated(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def packed(lengths: tuple[int, ...] = LENGTHS) -> Pass:
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].expand(2, -1)
    return Pass(torch.cat([torch.arange(n) for n in lengths])[None], segments)


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("taps", [2, 5, 16])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", SLOW)
def test_convolution_is_its_formula(make_block: Callable[..., Any], name: str, dtype: torch.dtype, taps: int) -> None:
    block, u = make_block("convolution", {"name": name, "taps": taps}, dim=7, dtype=dtype), drawn(2, T, 7, dtype=dtype)
    leaves = u.clone().requires_grad_(), u.clone().requires_grad_()
    found, right = block(leaves[0], packed()), slow(name, leaves[1], block.weight)
    torch.testing.assert_close(found, right, rtol=0, atol=EXACT[dtype] * 10)
    towards, weight = drawn(2, T, 7, dtype=dtype, seed=1), block.weight
    grads = (
        torch.autograd.grad(found, (leaves[0], weight), towards),
        torch.autograd.grad(right, (leaves[1], weight), towards),
    )
    for own, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=EXACT[dtype] * 100)
    torch.testing.assert_close(block(u), slow(name, u, weight, (T,)), rtol=0, atol=EXACT[dtype] * 10)


def test_every_registered_convolution_is_tested() -> None:
    assert set(registry.names("convolution")) == set(SLOW)


def test_canon_is_the_layer_of_inkling_in_transformers(make_block: Callable[..., Any]) -> None:
    inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling")
    theirs = inkling.InklingShortConvolution(7, 4, layer_idx=0, conv_idx=0)
    ours, u = make_block("convolution", "canon", dim=7, dtype=torch.float32), drawn(3, T, 7, dtype=torch.float32)
    theirs.load_state_dict({"conv1d.weight": ours.weight[:, None]})
    leaves = u.clone().requires_grad_(), u.clone().requires_grad_()
    torch.testing.assert_close(ours(leaves[0]), theirs(leaves[1]), rtol=0, atol=1e-5)
    for block, leaf in zip((ours, theirs), leaves, strict=True):
        block(leaf).pow(2).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.conv1d.weight.grad[:, 0], rtol=1e-5, atol=1e-4)


# --- the four places --------------------------------------------------------------------------------------------------

WIDE = {"name": "canon", "taps": 3}
B = {"query_conv": "canon", "key_conv": WIDE, "value_conv": "silu"}
AROUND = {"attention_conv": "canon", "attention_out_conv": "silu", "ffn_conv": WIDE, "ffn_out_conv": "canon"}
GATED = {"gate_conv": "canon", "up_conv": WIDE}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, **B},
    "mha": {"name": "mha", "n_heads": 4, **B},
    "mqa": {"name": "mqa", "n_heads": 4, **B},
    "window": {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 5, **B},
    "mla": {"name": "mla", "n_heads": 4, "q_lora_rank": 12, "query_conv": "canon", "latent_conv": WIDE},
    "recurrent": {"name": "gated_delta", "n_heads": 4},
}
FFNS: dict[str, Any] = {
    "swiglu": {"name": "swiglu", "d_ff": 24, **GATED},
    "geglu": {"name": "geglu", "d_ff": 24, **GATED},
    "bounded_swiglu": {"name": "bounded_swiglu", "d_ff": 24, **GATED},
    "gated_swiglu": {"name": "gated_swiglu", "d_ff": 24, **GATED},
    "gelu": {"name": "gelu", "d_ff": 24, "bias": True, "up_conv": "canon"},
    "relu2": {"name": "relu2", "d_ff": 24, "up_conv": "canon"},
    "xielu": {"name": "xielu", "d_ff": 24, "up_conv": "silu"},
    "moe": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 24, **GATED}},
}
RESIDUALS = [
    "prenorm",
    "postnorm",
    "sandwich",
    "parallel",
    "reordered",
    "mhc",
    "hyper_connections",
    "attention_residual",
]


def model(attention: str = "gqa", ffn: str = "swiglu", residual: str = "prenorm", **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": V,
        "d_model": 32,
        "n_layers": 2,
        "max_positions": 64,
        "attention": ATTENTIONS[attention],
        "position": "rope",
        "ffn": FFNS[ffn],
        "gating": {"name": "softmax_topk", "top_k": 2},
        "experts": {"name": "swiglu", "d_ff": 16},
        "norm": "rmsnorm",
        "residual": {"name": "convolved", "residual": residual, **AROUND},
        "init": {"std": 0.2},
        **changes,
    }


MODELS = [
    *({"attention": name} for name in ATTENTIONS),
    *({"ffn": name} for name in FFNS if name != "swiglu"),
    *({"residual": name} for name in RESIDUALS[1:]),
]


def composed(dtype: torch.dtype = torch.float64, **names: Any) -> Decoder:
    return compose(model(**names), seed=3).to(dtype).eval()


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_canon_layers_stand_where_the_paper_has_them() -> None:
    """A layer of gqa and swiglu, written as the paper's code is: A and C after the norms, B before rotation, D before
    the activation."""
    layer: Any = composed().layers[0]
    x, given = drawn(2, T, 32), packed()
    attention, ffn, around = layer.attention, layer.ffn, layer.residual
    h = slow("canon", around.residual.attention_norm(x), around.attention_conv.weight)
    names = {"query": "canon", "key": "canon", "value": "silu"}
    made = [
        slow(n, h @ getattr(attention, k).weight.T, getattr(attention, f"{k}_conv").weight) for k, n in names.items()
    ]
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in made)
    q, k = attention.position.rotate(q, k, given.positions)
    assert given.segments is not None
    hidden = (given.segments[0][:, None] != given.segments[0]) | torch.ones(T, T).triu(1).bool()
    scores = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    y = torch.einsum("bnts,bsnh->btnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.repeat_interleave(2, 2))
    x = x + slow("silu", y.flatten(-2) @ attention.output.weight.T, around.attention_out_conv.weight)
    h = slow("canon", around.residual.ffn_norm(x), around.ffn_conv.weight)
    gate, up = (slow("canon", h @ getattr(ffn, n).weight.T, getattr(ffn, f"{n}_conv").weight) for n in ("gate", "up"))
    right = x + slow("canon", (F.silu(gate) * up) @ ffn.down.weight.T, around.ffn_out_conv.weight)
    torch.testing.assert_close(layer(drawn(2, T, 32), given)[0], right, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("names", MODELS[::2], ids=str)
def test_prompt_in_parts_and_packed_documents_are_one_pass(names: dict[str, str]) -> None:
    decoder, rows = composed(**names), ids(2, T)
    whole, caches = decoder(rows), decoder.new_caches(2, T)
    parts = [decoder(part, caches=caches) for part in rows.split([5, 1, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    given = packed()
    alone = torch.cat([decoder(document) for document in rows.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(decoder(rows, given.positions, given.segments), alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_caches_in_other_precisions(dtype: torch.dtype) -> None:
    decoder, rows = composed(dtype), ids(2, T)
    caches = decoder.new_caches(2, T)
    parts = torch.cat([decoder.hidden(part, caches=caches)[0] for part in rows.split([4, 1, 8], 1)], 1)
    off = (parts - decoder.hidden(rows)[0]).float().norm(dim=-1).median()
    assert off < {torch.float32: 1e-5, torch.bfloat16: 0.08}[dtype] * 32**0.5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "window", "mla", "recurrent"])
def test_draft_is_forgotten_row_by_row(attention: str) -> None:
    """Three tokens of a draft behind padding, of which rows keep none, two and one."""
    decoder, rows, padding = composed(attention=attention), ids(3, 14), torch.tensor([0, 4, 9])
    keep = torch.tensor([0, 2, 1])
    caches = decoder.new_caches(3, 24, padding=padding)
    decoder(rows[:, :10], caches=caches)
    marks = [cache.mark(3) for cache in caches]
    draft = torch.where(torch.arange(3) < keep[:, None], rows[:, 10:13], (rows[:, 10:13] + 1) % V)
    decoder(draft[:, :1], caches=caches)
    decoder(draft[:, 1:], caches=caches)
    for cache, mark in zip(caches, marks, strict=True):
        cache.rewind(mark, keep)
        cache.padding = padding + keep.max() - keep
    following = torch.cat([rows[i : i + 1, 10 + n : 12 + n] for i, n in enumerate(keep.tolist())])
    found = decoder(following, caches=caches)
    for i, n in enumerate(keep.tolist()):
        right = decoder(rows[i : i + 1, int(padding[i]) : 12 + n])[:, -2:]
        torch.testing.assert_close(found[i : i + 1], right, rtol=0, atol=1e-10)


@torch.no_grad()
def test_last_token_of_a_prompt_is_that_of_the_whole() -> None:
    decoder, rows = composed(), ids(2, T)
    caches = decoder.new_caches(2, T + 1)
    for part, end in ((rows[:, :6], 5), (rows[:, 6:], T - 1)):
        found = decoder.last_hidden(part, caches)
        torch.testing.assert_close(found, decoder.hidden(rows)[0][:, end : end + 1], rtol=0, atol=1e-11)


def test_cache_holds_the_tails_of_all_convolutions() -> None:
    decoder = composed(torch.float32)
    cache: Any = decoder.new_caches(2, 9)[0]
    tails = 3 * 32 + 2 * 16 + 3 * 16 + 3 * 24 + 2 * 24 + 3 * 32 + 3 * 32 + 2 * 32 + 3 * 32
    assert isinstance(cache, LayerCache) and cache.nbytes == 4 * 2 * (9 * 2 * 2 * 8 + tails)
    plain = compose(model(residual="prenorm") | {"residual": "prenorm", "attention": "mha", "ffn": "swiglu"})
    assert type(plain.new_caches(1, 9)[0]) is Cache


def test_convolution_of_zeros_leaves_a_model_as_it_is() -> None:
    zero = {"name": "canon", "spread": 0}
    around = {"name": "convolved", "residual": "prenorm", **dict.fromkeys(AROUND, zero)}
    attention = {"name": "gqa", "n_heads": 4, **dict.fromkeys(B, zero)}
    ffn = {"name": "swiglu", "d_ff": 24, **dict.fromkeys(GATED, zero)}
    decoder = compose(model(residual="prenorm") | {"residual": around, "attention": attention, "ffn": ffn}, seed=1)
    plain = compose(
        model()
        | {"residual": "prenorm", "attention": {"name": "gqa", "n_heads": 4}, "ffn": {"name": "swiglu", "d_ff": 24}}
    )
    held = {n.replace("residual.residual", "residual"): p for n, p in decoder.state_dict().items() if "_conv" not in n}
    plain.load_state_dict(held)
    rows = ids(2, T)
    assert torch.equal(decoder(rows), plain(rows))
    decoder.nll(decoder.hidden(rows)[0], rows.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in decoder.named_parameters() if "_conv" in n)


# --- refusals ---------------------------------------------------------------------------------------------------------

CHILD = {"attention": {"name": "gqa", "n_heads": 4, "key_conv": {"name": "canon", "taps": 1}}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one tap": (CHILD, "model.attention.key_conv.taps"),
    "a negative spread": (
        {"ffn": {"name": "swiglu", "up_conv": {"name": "canon", "spread": -1}}},
        "model.ffn.up_conv.spread",
    ),
    "an unknown convolution": ({"ffn": {"name": "gelu", "up_conv": "cannon"}}, "model.ffn.up_conv.name"),
    "a place that a block has not": ({"ffn": {"name": "gelu", "gate_conv": "canon"}}, "model.ffn.gate_conv"),
    "no inner residual": ({"residual": {"name": "convolved", "residual": None}}, "model.residual.residual"),
    "itself inside": ({"residual": {"name": "convolved", "residual": "convolved"}}, "model.residual.residual"),
    "convolution of the model": ({"convolution": "canon"}, "model.convolution"),
    "another kind": (
        {"attention": {"name": "gqa", "n_heads": 4, "key_conv": "rmsnorm"}},
        "model.attention.key_conv.name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_convolution_that_cannot_be_is_refused(case: str) -> None:
    changes, path = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        compose({**model(), **changes}, device="meta")
    assert caught.value.path == path and caught.value.rule and caught.value.remedy


@pytest.mark.parametrize("inner", ["convolved", {"name": "convolved", "residual": "prenorm"}])
def test_a_block_inside_itself_asks_for_another(inner: Any) -> None:
    with pytest.raises(ConfigError, match="would contain itself") as caught:
        compose({**model(), "residual": {"name": "convolved", "residual": inner}}, device="meta")
    assert caught.value.remedy == "Name another residual as the inner one"


def test_attention_with_a_foreign_cache_cannot_be_beside_convolutions(tiny: Callable[..., dict[str, Any]]) -> None:
    decoder: Any = composed()
    decoder.layers[0].attention.new_cache = lambda *given: object()
    with pytest.raises(BlockError, match="no Cache of blocks/cache"):
        decoder.new_caches(1, 4)
