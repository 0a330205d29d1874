"""Short convolutions against loops over tokens: alone, in the four places of Canon layers, and with every memory."""

from __future__ import annotations

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
from blockwright.registry import BlockError
from tests.blocks.small import Make, V, drawn, ids, in_parts, model, near, packed, rewind

T, LENGTHS = 13, (7, 1, 5)  # documents of a packed row


def slow(name: str, u: Tensor, weight: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """One token and one lag at a time, of documents u [B,T,W] one after another."""
    taps, mixed, first = weight.shape[1], torch.zeros_like(u), 0
    for length in lengths:
        for t in range(first, first + length):
            for lag in range(min(taps, t - first + 1)):
                mixed[:, t] = mixed[:, t] + weight[:, taps - 1 - lag] * u[:, t - lag]
        first += length
    return {"canon": u + mixed, "silu": mixed / (1 + (-mixed).exp())}[name]


@pytest.mark.parametrize(
    ("dtype", "exact", "taps"), [(torch.float64, 1e-12, 5), (torch.float64, 1e-12, 16), (torch.float32, 1e-5, 2)]
)
@pytest.mark.parametrize("name", registry.names("convolution"))
def test_convolution_is_its_formula(make_block: Make, name: str, dtype: torch.dtype, exact: float, taps: int) -> None:
    block, u = make_block("convolution", {"name": name, "taps": taps}, dim=7, dtype=dtype), drawn(2, T, 7, dtype=dtype)
    leaves, weight = (u.clone().requires_grad_(), u.clone().requires_grad_()), block.weight
    found, right = block(leaves[0], Pass(*packed(*LENGTHS, rows=2))), slow(name, leaves[1], weight)
    near(found, right, exact * 10)
    towards = drawn(2, T, 7, dtype=dtype, seed=1)
    ours, theirs = (torch.autograd.grad(y, (x, weight), towards) for y, x in zip((found, right), leaves, strict=True))
    near(ours, theirs, exact * 100)
    near(block(u), slow(name, u, weight, (T,)), exact * 10)


def test_canon_is_the_layer_of_inkling_in_transformers(make_block: Make) -> None:
    inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling")
    theirs = inkling.InklingShortConvolution(7, 4, layer_idx=0, conv_idx=0)
    ours, u = make_block("convolution", "canon", dim=7, dtype=torch.float32), drawn(3, T, 7, dtype=torch.float32)
    theirs.load_state_dict({"conv1d.weight": ours.weight[:, None]})
    leaves = u.clone().requires_grad_(), u.clone().requires_grad_()
    near(ours(leaves[0]), theirs(leaves[1]), 1e-5)
    for block, leaf in zip((ours, theirs), leaves, strict=True):
        block(leaf).pow(2).sum().backward()
    near(leaves[0].grad, leaves[1].grad, 1e-4)
    near(ours.weight.grad, theirs.conv1d.weight.grad[:, 0], 1e-4, 1e-5)


WIDE = {"name": "canon", "taps": 3}
B = {"query_conv": "canon", "key_conv": WIDE, "value_conv": "silu"}
AROUND = {"attention_conv": "canon", "attention_out_conv": "silu", "ffn_conv": WIDE, "ffn_out_conv": "canon"}
GATED = {"gate_conv": "canon", "up_conv": WIDE}
GQA = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, **B}
MODELS: list[dict[str, Any]] = [
    {"attention": GQA},
    {"attention": {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 5, **B}},
    {"attention": {"name": "mla", "n_heads": 4, "q_lora_rank": 12, "query_conv": "canon", "latent_conv": WIDE}},
    {"attention": {"name": "gated_delta", "n_heads": 4}},
    {"ffn": {"name": "gated_swiglu", "d_ff": 24, **GATED}},
    {"ffn": {"name": "gelu", "d_ff": 24, "bias": True, "up_conv": "canon"}},
    {"ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 24, **GATED}}},
    *({"residual": {"name": "convolved", "residual": name, **AROUND}} for name in ("mhc", "attention_residual")),
]


def composed(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    around = {"attention": GQA, "ffn": {"name": "swiglu", "d_ff": 24, **GATED}, "init": {"std": 0.2}, "d_model": 32}
    around |= {"gating": {"name": "softmax_topk", "top_k": 2}, "experts": {"name": "swiglu", "d_ff": 16}}
    around |= {"residual": {"name": "convolved", "residual": "prenorm", **AROUND}}
    return compose(model(**{**around, **changes}), seed=3).to(dtype).eval()


def test_canon_layers_stand_where_the_paper_has_them() -> None:
    """A layer of gqa and swiglu, written as the paper's code is: A and C after the norms, B before rotation, D before
    the activation."""
    layer: Any = composed().layers[0]
    x, given = drawn(2, T, 32), Pass(*packed(*LENGTHS, rows=2))
    attention, ffn, around = layer.attention, layer.ffn, layer.residual
    h = slow("canon", around.residual.attention_norm(x), around.attention_conv.weight)
    names = {"query": "canon", "key": "canon", "value": "silu"}
    made = [
        slow(n, h @ getattr(attention, k).weight.T, getattr(attention, f"{k}_conv").weight) for k, n in names.items()
    ]
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in made)
    q, k = attention.position.rotate(q, k, given.positions)
    hidden = (given.segments[0][:, None] != given.segments[0]) | torch.ones(T, T).triu(1).bool()
    scores = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    y = torch.einsum("bnts,bsnh->btnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.repeat_interleave(2, 2))
    x = x + slow("silu", y.flatten(-2) @ attention.output.weight.T, around.attention_out_conv.weight)
    h = slow("canon", around.residual.ffn_norm(x), around.ffn_conv.weight)
    gate, up = (slow("canon", h @ getattr(ffn, n).weight.T, getattr(ffn, f"{n}_conv").weight) for n in ("gate", "up"))
    right = x + slow("canon", (F.silu(gate) * up) @ ffn.down.weight.T, around.ffn_out_conv.weight)
    near(layer(drawn(2, T, 32), given)[0], right, 1e-11)


@torch.no_grad()
@pytest.mark.parametrize("names", MODELS, ids=lambda m: next(iter(m)))
def test_prompt_in_parts_and_packed_documents_are_one_pass(names: dict[str, Any]) -> None:
    decoder, rows = composed(**names), ids(T)
    whole, caches = decoder.hidden(rows)[0], decoder.new_caches(2, T)
    near(in_parts(decoder, rows[:, :7], [5, 1, 1], caches), whole[:, :7], 1e-10)
    near(decoder.last_hidden(rows[:, 7:], caches), whole[:, -1:], 1e-10)
    alone = torch.cat([decoder.hidden(document)[0] for document in rows.split(LENGTHS, 1)], 1)
    near(decoder.hidden(rows, *packed(*LENGTHS, rows=2))[0], alone, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)], ids=str)
def test_caches_in_other_precisions(dtype: torch.dtype, bound: float) -> None:
    decoder, rows = composed(dtype), ids(T)
    off = (in_parts(decoder, rows, [4, 1, 8]) - decoder.hidden(rows)[0]).float().norm(dim=-1).median()
    assert off < bound * 32**0.5


@torch.no_grad()
@pytest.mark.parametrize("changes", MODELS[:4], ids=lambda m: m["attention"]["name"])
def test_draft_is_forgotten_row_by_row(changes: dict[str, Any]) -> None:
    """Three tokens of a draft behind padding, of which rows keep none, two and one."""
    decoder, rows, padding = composed(**changes), ids(14, 3), torch.tensor([0, 4, 9])
    keep, caches = torch.tensor([0, 2, 1]), decoder.new_caches(3, 24, padding=padding)
    decoder(rows[:, :10], caches=caches)
    marks = [cache.mark(3) for cache in caches]
    draft = torch.where(torch.arange(3) < keep[:, None], rows[:, 10:13], (rows[:, 10:13] + 1) % V)
    in_parts(decoder, draft, [1, 2], caches)
    rewind(caches, marks, keep)
    for cache in caches:
        cache.padding = padding + keep.max() - keep
    found = decoder(torch.cat([rows[i : i + 1, 10 + n : 12 + n] for i, n in enumerate(keep.tolist())]), caches=caches)
    for i, n in enumerate(keep.tolist()):
        near(found[i : i + 1], decoder(rows[i : i + 1, int(padding[i]) : 12 + n])[:, -2:], 1e-10)


def test_cache_holds_the_tails_of_all_convolutions() -> None:
    decoder: Any = composed(torch.float32)
    cache = decoder.new_caches(2, 9)[0]
    tails = 3 * 32 + 2 * 16 + 3 * 16 + 3 * 24 + 2 * 24 + 3 * 32 + 3 * 32 + 2 * 32 + 3 * 32
    assert isinstance(cache, LayerCache) and cache.nbytes == 4 * 2 * (9 * 2 * 2 * 8 + tails)
    plain = composed(attention="mha", ffn="swiglu", residual="prenorm")
    assert type(plain.new_caches(1, 9)[0]) is Cache
    decoder.layers[0].attention.new_cache = lambda *given: object()
    with pytest.raises(BlockError, match="no Cache of blocks/cache"):
        decoder.new_caches(1, 4)


def test_convolution_of_zeros_leaves_a_model_as_it_is_and_learns() -> None:
    zero, gqa, swiglu = {"name": "canon", "spread": 0}, {"name": "gqa", "n_heads": 4}, {"name": "swiglu", "d_ff": 24}
    around = {"name": "convolved", "residual": "prenorm", **dict.fromkeys(AROUND, zero)}
    attention, ffn = {**gqa, **dict.fromkeys(B, zero)}, {**swiglu, **dict.fromkeys(GATED, zero)}
    decoder = composed(torch.float32, residual=around, attention=attention, ffn=ffn)
    plain = composed(torch.float32, residual="prenorm", attention=gqa, ffn=swiglu)
    held = {n.replace("residual.residual", "residual"): p for n, p in decoder.state_dict().items() if "_conv" not in n}
    plain.load_state_dict(held)
    rows = ids(T)
    assert torch.equal(decoder(rows), plain(rows))
    decoder.nll(decoder.hidden(rows)[0], rows.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in decoder.named_parameters() if "_conv" in n)
