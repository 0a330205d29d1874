"""Keys of windows: where windows close, what a key is made of, what a query sees, and what an index learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor

from blockwright.blocks.attention import shared_kv
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.compressor.base import Pool, ends_of
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import long_attention
from blockwright.registry import BlockError
from tests.blocks.small import Make, drawn, ids, near, packed, rewind

CSA = {"name": "csa", "every": 3, "n_heads": 2, "head_dim": 8, "top_k": 2}
HCA = {"name": "hca", "every": 4}
compressed = pytest.mark.parametrize("compressor", [CSA, HCA, None], ids=["csa", "hca", "near"])


@pytest.fixture
def model(tiny: Make, randomise: Make) -> Make:
    """A model of one layer with every weight random, in fp64."""

    def make(compressor: Any, **attention: Any) -> Decoder:
        node = {"name": "shared_kv", "n_heads": 4, "window": 5, "n_groups": 2, "scores": "sinks", **attention}
        decoder = compose(tiny(n_layers=1, max_positions=256, attention={**node, "compressor": compressor}))
        randomise(decoder)
        return decoder.double().eval()

    return make


def key_of(pool: Pool, x: Tensor, tokens: list[int], before: list[int]) -> Tensor:
    """The mean of a window [W] from its tokens of x [T,D], and those of the window before it."""
    values, gates = [], []
    for part, at in [(0, before), (1, tokens)] if pool.parts == 2 else [(0, tokens)]:
        channels = slice(part * pool.width, (part + 1) * pool.width)
        for t in at:
            place = pool.place[(t - at[0]) if len(at) == pool.every else pool.every - len(at) + (t - at[0])]
            values.append(pool.value(x[t])[channels])
            gates.append((pool.gate(x[t]) + place)[channels])
    return (torch.stack(gates).softmax(0) * torch.stack(values)).sum(0)


def windows(positions: list[int], segments: list[int], every: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of every closed window, and of the one before it in its document."""
    found: list[tuple[list[int], list[int]]] = []
    for t, (at, document) in enumerate(zip(positions, segments, strict=True)):
        if (at + 1) % every == 0:
            tokens = [s for s in range(max(0, t - every + 1), t + 1) if segments[s] == document]
            earlier = [s for s in range(max(0, t - 2 * every + 1), max(0, t - every + 1)) if segments[s] == document]
            found.append((tokens, earlier if at >= every else []))
    return found


@pytest.mark.parametrize(
    ("compressor", "documents", "first", "least"),
    pairs([CSA, HCA, None], [(23,), (7, 1, 11, 4), (3, 3, 2)], [0, 2, 5], [1, 1024]),
    ids=str,
)
@torch.no_grad()
def test_attention_is_that_of_the_definition(
    model: Make, monkeypatch: pytest.MonkeyPatch, compressor: Any, documents: tuple[int, ...], first: int, least: int
) -> None:
    monkeypatch.setattr(long_attention, "LEAST", least)
    for part in ("PART", "PART_OF_SEVERAL"):
        monkeypatch.setattr(long_attention, part, 1)
    attention: Any = model(compressor).layers[0].attention
    positions, segments = packed(*documents)
    positions = positions + first * (segments == 0)
    T, at, of = positions.shape[1], positions[0].tolist(), segments[0].tolist()
    x = drawn(1, T, 48, seed=1)

    def turned(heads: Tensor, position: int) -> Tensor:
        return attention._rotated(heads[None, None], torch.tensor([[position]]), 64)[0, 0]

    latent = attention.q_norm(attention.q_down(x[0]))
    key = attention.kv_norm(attention.kv(x[0]))
    entries: list[tuple[int, int, Tensor, Tensor | None]] = []  # closes at, document, key, index key
    part = attention.compressor
    for tokens, before in [] if part is None else windows(at, of, part.every):
        start = at[tokens[-1]] - part.every + 1
        own = turned(part.norm(key_of(part.pool, x[0], tokens, before))[None], start)[0]
        index = None
        if compressor is CSA:
            index = turned(part.index_norm(key_of(part.index_pool, x[0], tokens, before))[None], start)[0]
        entries.append((tokens[-1], of[tokens[-1]], own, index))
    want = []
    for t in range(T):
        q = turned(attention.query_norm(attention.q_up(latent[t]).unflatten(-1, (4, -1))), at[t])
        close = [turned(key[s][None], at[s])[0] for s in range(max(0, t - 4), t + 1) if of[s] == of[t]]
        seen = [entry for entry in entries if entry[0] <= t and entry[1] == of[t]]
        if compressor is CSA and len(seen) > 2:
            asks = turned(part.index.query(latent[t]).unflatten(-1, (2, -1)), at[t])
            weights = part.index.weights(x[0, t]) * 2**-0.5
            scores = [((asks @ entry[3] * 8**-0.5).relu() * weights).sum().item() for entry in seen]
            best = sorted(range(len(seen)), key=lambda i: (scores[i], i))[-2:]
            seen = [seen[i] for i in best]
        keys = torch.stack([*close, *(entry[2] for entry in seen)])
        scores_t = torch.cat((q @ keys.T * attention.scale, attention.scores.sinks[:, None]), -1).softmax(-1)[:, :-1]
        y = turned(scores_t @ keys, -at[t]).flatten().unflatten(0, (2, -1))
        want.append(attention.output(torch.einsum("gh,glh->gl", y, attention.group).flatten()))
    found = attention(x, Pass(positions, segments=None if len(documents) == 1 else segments))
    near(found[0], torch.stack(want), 1e-10)


def test_windows_close_where_positions_say() -> None:
    ends = ends_of(torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11, 12]]), 3)
    assert ends.at[:, :2].tolist() == [[2, 7], [0, 3]] and ends.number[:, :2].tolist() == [[0, 0], [1, 2]]
    assert ends.real.tolist() == [[True, True, False], [True, True, True]]


@compressed
@torch.no_grad()
def test_queries_in_parts_are_those_together(model: Make, monkeypatch: pytest.MonkeyPatch, compressor: Any) -> None:
    decoder, tokens, documents = model(compressor), ids(37, 1), packed(17, 1, 19)
    for dtype, bound, most in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.08, 1.0)):
        monkeypatch.undo()
        whole = decoder.to(dtype).hidden(tokens, *documents)[0]
        for rows in (1, 7, 36):
            monkeypatch.setattr(shared_kv, "ROWS", rows)
            found = decoder.hidden(tokens, *documents)[0]
            assert ((found - whole).float().norm(dim=-1) / whole.float().norm(dim=-1)).median() <= bound / 20
            near(found, whole, most)


@compressed
@torch.no_grad()
def test_cache_goes_back_and_to_other_rows(model: Make, compressor: Any) -> None:
    decoder, tokens = model(compressor), ids(31)
    caches = decoder.new_caches(2, 40, padding=torch.tensor([0, 6]))
    decoder.hidden(tokens[:, :17], caches=caches)
    marks = [cache.mark() for cache in caches]
    want = decoder.hidden(tokens[:, 17:], caches=caches)[0]
    rewind(caches, marks)
    decoder.hidden(tokens[:, :9].flip(0), caches=caches)  # overwrites
    rewind(caches, marks)
    for cache in caches:
        cache.take(torch.tensor([1, 0, 1]))
    near(decoder.hidden(tokens[[1, 0, 1], 17:], caches=caches)[0], want[[1, 0, 1]], 1e-10)


@compressed
@torch.no_grad()
def test_a_row_joins_and_a_draft_is_forgotten_by_row(model: Make, compressor: Any) -> None:
    decoder, tokens = model(compressor), ids(31)
    want = [decoder.hidden(tokens[i : i + 1])[0] for i in range(2)]
    batch, own = decoder.new_caches(3, 40), decoder.new_caches(1, 40)
    padding = torch.tensor([0, 8])
    decoder.hidden(tokens[:1, :25], caches=own)
    other = decoder.new_caches(1, 40)
    decoder.hidden(tokens[1:, :17], caches=other)
    for cache, first, second in zip(batch, own, other, strict=True):
        cache.use(2)
        cache.length, cache.padding = 25, padding
        cache.put(0, first)
        cache.put(1, second)
    marks = [cache.mark(3) for cache in batch]
    draft = torch.cat((tokens[:1, 25:28], torch.cat((tokens[1:, 17:18], tokens[1:, :2]), 1)))  # row 1: one is right
    decoder.hidden(draft, caches=batch)
    for cache, mark in zip(batch, marks, strict=True):
        cache.rewind(mark, torch.tensor([3, 1]))
        cache.padding = padding + torch.tensor([0, 2])
    found = decoder.hidden(torch.cat((tokens[:1, 28:31], tokens[1:, 18:21])), caches=batch)[0]
    near(found, torch.stack((want[0][0, 28:31], want[1][0, 18:21])), 1e-10)


def test_cache_holds_a_window_and_a_key_of_each_closed_one(model: Make) -> None:
    attention: Any = model(CSA, head_dim=16).layers[0].attention
    sizes = [attention.new_cache(1, n, torch.float32, torch.device("meta")).nbytes // 4 for n in (60, 120)]
    assert sizes[1] - sizes[0] == 60 // 3 * (16 + 8)
    plain: Any = model(None, head_dim=16).layers[0].attention
    assert plain.new_cache(1, 60, torch.float32, torch.device("meta")).nbytes // 4 == 5 * 16


def test_cache_that_is_full_or_of_another_kind_is_refused(model: Make) -> None:
    decoder = model(HCA)
    caches = decoder.new_caches(1, 8)
    decoder.hidden(ids(8, 1), caches=caches)
    with pytest.raises(BlockError, match="has room for 8 tokens"):
        decoder.hidden(ids(1, 1), caches=caches)
    other = Cache(1, 8, {"k": (1, 12)}, torch.float64, torch.device("cpu"))
    with pytest.raises(BlockError, match="new_cache"):
        decoder.hidden(ids(2, 1), caches=[other])


def losses_of(decoder: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the outputs, and the index's loss."""
    hidden, routings = decoder.train().hidden(tokens)
    found = [loss for r in routings if r is not None for loss in r.losses.values()]
    assert len(found) == 1
    return hidden.square().sum(), found[0]


def test_index_learns_from_its_own_loss_alone(model: Make) -> None:
    decoder = model(CSA)
    output, loss = losses_of(decoder, ids(23))
    assert 0 < loss.item() < 10
    own = [p for n, p in decoder.named_parameters() if ".index" in n]
    others = [p for n, p in decoder.named_parameters() if ".index" not in n]
    assert len(own) == 6  # of its pool, its norm, its query and its weights
    assert all(g is None for g in torch.autograd.grad(output, own, allow_unused=True, retain_graph=True))
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(loss, own, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))


@pytest.mark.slow
def test_a_step_against_its_gradient_brings_the_index_nearer(model: Make) -> None:
    decoder, tokens = model({**CSA, "dense": True}), ids(41)
    own = [p for n, p in decoder.named_parameters() if ".index" in n]
    optimizer = torch.optim.Adam(own, lr=0.02)
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = losses_of(decoder, tokens)[1]
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0] / 2


def test_dense_index_leaves_nothing_out(model: Make) -> None:
    tokens = ids(30)
    dense, many = (model({**CSA, **change})(tokens) for change in ({"dense": True}, {"top_k": 10}))
    assert torch.equal(dense, many)
    assert (model(CSA)(tokens) - many).abs().max() > 1e-3
