"""Selectors: what they choose, by the definition and by transformers' code; ties; documents; what an indexer learns."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blockwright.blocks.attention.scoring import Selection
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.long_attention import few
from blockwright.blocks.selector import dsa
from blockwright.blocks.selector.base import Asked, Held, blocks_of, highest
from blockwright.blocks.selector.dsa import attention_weights, divergence, relu_scores
from tests.blocks.small import Make, drawn, ids, near, order, packed, rewind

LATENT = {"name": "mla", "n_heads": 3, "kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 7}
LATENT |= {"qk_rope_head_dim": 6, "v_head_dim": 5}
GROUPED = {"name": "gqa", "n_heads": 6, "n_kv_heads": 2, "head_dim": 8}
DSA = {"name": "dsa", "n_heads": 2, "head_dim": 10, "rope_head_dim": 6, "top_k": 5}
POOLED = {"name": "pooled", "n_heads": 3, "head_dim": 10, "block_size": 4, "top_k": 2}
BLOCK = {"name": "block", "block_size": 5, "top_k": 2}
SHARED = {"name": "shared", "of": DSA, "every": 3}
POOLED_DSA = {"name": "pooled_dsa", "n_heads": 2, "head_dim": 10, "rope_head_dim": 6, "block_size": 4, "top_k": 2}
SELECTORS = [DSA, POOLED, BLOCK, SHARED, POOLED_DSA]
named = pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s["name"])


@pytest.fixture
def model(tiny: Make, randomise: Make) -> Make:
    """A model of three layers with every weight random, in fp64; without a selector it has the same weights."""

    def make(attention: dict[str, Any], selector: dict[str, Any] | None, **changes: Any) -> Decoder:
        config = {"n_layers": 3, "max_positions": 128, **changes}
        decoder = compose(tiny(**config, attention={**attention, "selector": selector}))
        for name, part in decoder.named_modules():
            if not list(part.children()) and "selector" not in name:
                randomise(part, seed=len(name))
        for name, part in decoder.named_modules():
            if name.endswith("selector"):
                randomise(part, seed=7)
        return decoder.double().eval()

    return make


def test_highest_breaks_ties_towards_the_later_at_every_length() -> None:
    scores = torch.randint(0, 4, (50, 23), generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 5, 22, 23, 40):
        for end in (1, 4, 17, 23):
            of_sort = torch.zeros(50, end, dtype=torch.bool)
            order = scores[:, :end].flip(1).sort(stable=True, dim=-1, descending=True).indices[:, :k]
            assert torch.equal(highest(scores[:, :end], k), of_sort.scatter(1, end - 1 - order, True))
            behind = nn.functional.pad(scores[:, :end], (0, 23 - end), value=-math.inf)  # what no query sees
            assert k > end or torch.equal(highest(behind, k)[:, :end], highest(scores[:, :end], k))


@torch.no_grad()
def test_no_choice_asks_for_values_where_there_are_none() -> None:
    with FakeTensorMode():
        assert highest(torch.randn(3, 40), 5).shape == (3, 40)
        assert few(torch.randn(2, 3, 2000) > 3) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_computed_in_tiles_are_those_of_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, tolerance = torch.Generator().manual_seed(0), 1e-12 if dtype == torch.float64 else 1e-5
    q, keys, weights = (torch.randn(s, generator=draw).to(dtype) for s in ((2, 5, 3, 7), (2, 29, 7), (2, 5, 3)))
    products = torch.einsum("btji,bni->btnj", q.double(), keys.double()).relu()
    expected = (products * weights.double()[:, :, None]).sum(-1) / math.sqrt(7)
    for tile in (1, 2 * 15 * 4, 2**19):
        monkeypatch.setattr(dsa, "TILE", tile)
        with torch.no_grad():
            found = relu_scores(q, keys, weights)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(relu_scores(q, keys, weights).double(), expected, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    ("selector", "attention"),
    [(s, a) for s in SELECTORS for a in (GROUPED, LATENT) if a is LATENT or s in (DSA, BLOCK)],
    ids=lambda node: node["name"],
)
def test_stepping_equals_one_pass_in_which_keys_are_left_out_only_where_there_are_more_than_it_takes(
    model: Make, attention: dict[str, Any], selector: Any
) -> None:
    """With two index heads, a quarter of whose scores are 0: where transformers' own steps differ from its pass."""
    chooses, dense, tokens = model(attention, selector), model(attention, None), ids(40)
    fits = {"dsa": 5, "pooled": 11, "block": 10, "shared": 5, "pooled_dsa": 11}[selector["name"]]
    assert [chooses.layers[0].attention.selector.takes_all(n) for n in (1, fits, fits + 1)] == [True, True, False]
    assert torch.equal(chooses(tokens[:, :fits]), dense(tokens[:, :fits]))
    caches, plain, whole, found = chooses.new_caches(2, 40), dense.new_caches(2, 40), chooses(tokens), []
    for part in tokens.split([3, *[1] * (fits - 3), 13, 1, 1, 25 - fits], 1):
        found.append(chooses(part, caches=caches))
        assert caches[0].length > fits or torch.equal(found[-1], dense(part, caches=plain))
    near(torch.cat(found, 1), whole, 1e-10)
    assert (whole - dense(tokens))[:, fits + 1 :].abs().max() > 1e-3


@torch.no_grad()
@named
def test_every_query_sees_a_key_padding_too(model: Make, selector: Any) -> None:
    """Some kernels make NaN of a query that sees none, and in the next layer of all that see it."""
    decoder, seen = model(GROUPED, selector), []
    for layer in decoder.layers:
        attention: Any = layer.attention
        attention.selector.register_forward_hook(lambda module, asked, chosen: seen.append(chosen.any(-1)))
    caches = decoder.new_caches(3, 40, padding=torch.tensor([0, 7, 26]))
    for part in ids(40, 3).split([31, 1, 8], 1):
        decoder(part, caches=caches)
    assert len(seen) == 9 and all(bool(each.all()) for each in seen)


@torch.no_grad()
@named
def test_packed_and_padded_rows_equal_each_alone(model: Make, selector: Any) -> None:
    decoder, lengths = model(LATENT, selector), (17, 3, 22)
    documents = [ids(n, 1) for n in lengths]
    together = decoder(torch.cat(documents, 1), *packed(*lengths)).split(lengths, 1)
    padded = torch.cat([nn.functional.pad(d, (22 - d.shape[1], 0)) for d in documents])
    padding = torch.tensor([22 - n for n in lengths])
    caches = decoder.new_caches(3, 22, padding=padding)
    behind = torch.cat([decoder(part, caches=caches) for part in padded.split([20, 1, 1], 1)], 1)
    for i, (document, found) in enumerate(zip(documents, together, strict=True)):
        near(found, decoder(document), 1e-10)
        near(behind[i : i + 1, padding[i] :], decoder(document), 1e-10)


@torch.no_grad()
@named
def test_cache_holds_index_keys_and_rewinds(model: Make, selector: Any) -> None:
    decoder, tokens = model(GROUPED, selector), ids(30)
    whole, caches = decoder(tokens), decoder.new_caches(2, 30)
    extra = [sum(b.nbytes for name, b in cache.buffers.items() if name == "selector.index") for cache in caches]
    one = 2 * 30 * 10 * 8 if selector["name"] in ("dsa", "pooled", "pooled_dsa") else 0
    assert extra == [one] * 3 if selector is not SHARED else extra == [2 * 30 * 10 * 8, 0, 0]
    decoder(tokens[:, :20], caches=caches)
    marks = [cache.mark() for cache in caches]
    decoder(ids(7).flip(1), caches=caches)
    rewind(caches, marks)
    near(decoder(tokens[:, 20:], caches=caches), whole[:, 20:], 1e-10)


def chosen_by(block: Any, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """What a selector chooses for tokens x [B,T,D], queries [B,T,N,H] and keys [B,T,K,H]: [B,N|1,T,T]."""
    asked = Asked(x, x, q, order(x.shape[1]), x.shape[1])
    slots = block.remember(x, asked.positions, asked.declared)
    selection = Selection(block, asked, k, lambda keys: keys, slots, None, Pass(asked.positions))
    return block(asked, selection.held())


@torch.no_grad()
def test_block_sees_its_own_and_the_best_blocks_before(make_block: Make) -> None:
    block = make_block("selector", {**BLOCK, "top_k": 3}, latent_dim=48, attention_heads=4)
    q, k = (drawn(2, 33, n, 8, seed=n) for n in (4, 2))
    found = chosen_by(block, torch.zeros(2, 33, 48, dtype=torch.float64), q, k)
    for b, n, t in ((0, 0, 32), (1, 3, 25), (0, 2, 9), (1, 1, 3), (0, 1, 19)):
        scores = [(q[b, t, n] @ k[b, 5 * i : 5 * i + 5, n // 2].mean(0)).item() for i in range(t // 5)]
        best = {t // 5, *sorted(range(t // 5), key=lambda i: (scores[i], i))[-2:]}
        assert found[b, n, t].tolist() == [s <= t and s // 5 in best for s in range(33)]


@torch.no_grad()
def test_pooled_chooses_as_transformers_qsa(make_block: Make) -> None:
    from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs

    sizes = {"hidden_size": 48, "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 10}
    config = SimpleNamespace(**sizes, indexer_budget=8, rms_norm_eps=1e-6, indexer_compress_ratio=4)
    indexer = theirs.Qwen4ExpTextQSAIndexer(config, 0)
    around = {"position": {"name": "rope", "theta": 100.0}, "norm": {"name": "rmsnorm", "eps": 1e-6}}
    node = {**POOLED, "n_heads": 16}
    block = make_block("selector", node, around=around, latent_dim=48, attention_heads=4, dtype=torch.float32)
    indexer.index_qk_proj.weight.copy_(torch.cat((block.query.weight, block.key.weight)))
    for norm, of in ((indexer.q_layernorm, block.q_norm), (indexer.k_layernorm, block.k_norm)):
        norm.weight.copy_(of.weight - 1)  # gains are stored minus one
    x = torch.randn(2, 35, 48, generator=torch.Generator().manual_seed(2))
    angles = torch.arange(35)[:, None] * block.position.frequencies(x.device)
    embeddings = tuple(torch.cat((f(angles), f(angles)), -1)[None].expand(2, -1, -1) for f in (torch.cos, torch.sin))
    seen = torch.ones(35, 35, dtype=torch.bool).tril().expand(2, 1, 35, 35)
    expected = indexer(x, embeddings, seen, None) & seen
    assert torch.equal(chosen_by(block, x, torch.zeros(2, 35, 4, 8), torch.zeros(2, 35, 1, 8)), expected)


def test_blocks_are_counted_in_each_document() -> None:
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]])
    held = Held(torch.zeros(1, 11, 1), lambda k: k, (), places, places, torch.ones(1, 11, 11, dtype=torch.bool), True)
    blocks = blocks_of(held, 3)
    assert blocks.number.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4]]
    assert blocks.first.tolist() == [[0, 3, 5, 7, 10]]
    before = blocks.complete(11, own=False)[0]
    assert [row.nonzero().flatten().tolist() for row in before] == [[]] * 3 + [[0], [0]] + [[]] * 5 + [[3]]
    assert blocks.mean(torch.arange(11.0)[None, :, None])[0, :4:3, 0].tolist() == [1.0, 8.0]


@torch.no_grad()
def test_layers_that_share_see_what_the_layer_below_chose(model: Make) -> None:
    """As if each had the indexer of layer 0 and its input."""
    model({**GROUPED, "scores": "sinks"}, BLOCK)  # a selector that learns would be refused beside other scores
    decoder, tokens = model(GROUPED, SHARED), ids(30)
    seen: list[Any] = []
    for layer in decoder.layers:
        hook = lambda module, given, out: seen.append(given[1].carry["chosen"])  # noqa: E731
        layer.attention.register_forward_hook(hook)
    decoder(tokens)
    assert seen[0].sum(-1).max() == DSA["top_k"] and all(torch.equal(each, seen[0]) for each in seen)


def test_divergence_is_the_mean_over_heads_against_the_scores() -> None:
    q, k, scores, seen = drawn(2, 9, 6, 4), drawn(2, 9, 3, 4, seed=1), drawn(2, 9, 9), torch.ones(1, 9, 9).tril().bool()
    found, expected = divergence(attention_weights(q, k, 0.5, seen), scores, seen), 0.0
    for b in range(2):
        for t in range(9):
            heads = [(0.5 * k[b, : t + 1, n // 2] @ q[b, t, n]).softmax(0) for n in range(6)]
            p, s = torch.stack(heads).mean(0), scores[b, t, : t + 1].softmax(0)
            expected += (p * (p / s).log()).sum().item()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    nothing = torch.zeros(1, 9, 9, dtype=torch.bool)
    assert divergence(attention_weights(q, k, 0.5, seen), scores, nothing) == 0


@pytest.mark.parametrize(
    ("selector", "attention", "dense"),
    [(DSA, GROUPED, True), (DSA, LATENT, False), (POOLED, GROUPED, False), (POOLED, LATENT, True)],
)
def test_its_loss_moves_nothing_but_the_selector(
    model: Make, attention: dict[str, Any], selector: Any, dense: bool
) -> None:
    decoder, tokens = model(attention, {**selector, "dense": dense}).train(), ids(30)
    _, routings = decoder.hidden(tokens)
    losses = [routing.losses["index_kl"] for routing in routings if routing is not None]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    torch.stack(losses).sum().backward()
    moved = {name for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in decoder.named_parameters() if "selector" in name}
    assert not any(decoder.eval().hidden(tokens)[1])


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_an_indexer_learns_what_attention_looks_at(model: Make, dense: bool) -> None:
    decoder = model(LATENT, {**DSA, "dense": dense}).train()
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("selector" in name)
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], lr=0.01)
    seen = []
    for _ in range(40):
        loss = sum(routing.losses["index_kl"] for routing in decoder.hidden(ids(30))[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_long_sequences_are_scored_in_parts(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[Tensor, list[Tensor]]:
        decoder = model(GROUPED, DSA).train()
        hidden, routings = decoder.hidden(ids(30))
        sum(routing.losses["index_kl"] for routing in routings).backward()
        return hidden.detach(), [p.grad for n, p in decoder.named_parameters() if "selector" in n]

    whole, grads = trained()
    monkeypatch.setattr("blockwright.blocks.selector.dsa.PAIRS", 2 * 30 * 6 * 4)
    parts, of_parts = trained()
    near([parts, *of_parts], [whole, *grads])
