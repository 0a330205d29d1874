"""Keys and choices that several layers share, against loops over tokens by the formulas of DeepSeek-V4.1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor

from blockwright.blocks.compose import check, compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError
from tests.blocks.small import Make, drawn, ids, in_parts, near, packed

TOP, BLOCKS, SIZE, WINDOW = 2, 2, 2, 5
INDEX = {"n_heads": 8, "head_dim": 8, "top_k": TOP, "blocks": BLOCKS, "block_size": SIZE}


@pytest.fixture
def model(tiny: Make, randomise: Make) -> Make:
    """Layers of which the first makes keys and chooses, the second reuses both, and the third chooses again; the fourth
    makes keys again. Every weight is random, in fp64."""

    def make(every: int, **changes: Any) -> Decoder:
        compressor = {"name": "csa2", "every": every, "keys": 3, "choices": 2, **INDEX, **changes}
        attention = {"name": "shared_kv", "n_heads": 4, "window": WINDOW, "n_groups": 2, "scores": "sinks"}
        decoder = compose(tiny(n_layers=4, max_positions=256, attention={**attention, "compressor": compressor}))
        randomise(decoder)
        return decoder.double().eval()

    return make


class Keys:
    """Windows of a sequence: the token at which each closes, its document and number there, its key and index key."""

    def __init__(self, attention: Any, x: Tensor, at: list[int], of: list[int]) -> None:
        part = attention.compressor
        self.closes, self.of, self.number, keys, index = list[int](), list[int](), list[int](), [], []
        for t in range(len(x)):
            if (at[t] + 1) % part.every:
                continue
            tokens = [s for s in range(max(0, t - part.every + 1), t + 1) if of[s] == of[t]]
            values, start = torch.stack([part.pool.value(x[s]) for s in tokens]), at[t] - part.every + 1
            if part.every > 1:
                gates = torch.stack([part.pool.gate(x[s]) for s in tokens]).softmax(0)
                values = gates * values
            latent = part.norm(values.sum(0))
            keys.append(turned(attention, latent[None], start)[0])
            index.append(turned(attention, part.index_norm(part.index_key(latent))[None], start)[0])
            self.closes.append(t)
            self.of.append(of[t])
            self.number.append(at[t] // part.every)
        self.keys, self.index = torch.stack(keys), torch.stack(index)

    def seen(self, t: int, of: list[int]) -> list[int]:
        return [w for w, closes in enumerate(self.closes) if closes <= t and self.of[w] == of[t]]


def turned(attention: Any, heads: Tensor, position: int) -> Tensor:
    return attention._rotated(heads[None, None], torch.tensor([[position]]), 64)[0, 0]


def scores_of(
    attention: Any, x: Tensor, latent: Tensor, position: int, keys: Keys, seen: list[int]
) -> dict[int, float]:
    index = attention.compressor.index
    q = turned(attention, index.query(latent).unflatten(-1, (8, -1)), position)
    weights = index.weights(x) * 8**-0.5
    return {w: float(((q @ keys.index[w] * 8**-0.5).relu() * weights).sum()) for w in seen}


def highest(scores: dict[int, float]) -> list[int]:
    return sorted(sorted(scores, key=lambda w: (scores[w], w))[-TOP:])


def best_blocks(scores: dict[int, float], keys: Keys) -> list[int]:
    """Windows in the blocks of the highest scores; that of the newest window is one of them."""
    blocks: dict[int, float] = {}
    for w, score in scores.items():
        blocks[keys.number[w] // SIZE] = max(score, blocks.get(keys.number[w] // SIZE, -1e9))
    if blocks:
        blocks[keys.number[max(scores)] // SIZE] = 1e9
    best = sorted(blocks, key=lambda b: (blocks[b], b))[-BLOCKS:]
    return [w for w in scores if keys.number[w] // SIZE in best]


@pytest.mark.parametrize(
    ("every", "documents", "first"), pairs([1, 2, 3], [(23,), (7, 1, 11, 4), (3, 3, 2)], [0, 2, 5]), ids=str
)
@torch.no_grad()
def test_layers_share_keys_and_choices_by_the_definition(
    model: Make, every: int, documents: tuple[int, ...], first: int
) -> None:
    positions, segments = packed(*documents)
    positions = positions + first * (segments == 0)
    T, at, of = positions.shape[1], positions[0].tolist(), segments[0].tolist()
    given = Pass(positions, segments=None if len(documents) == 1 else segments, carry={})
    chosen, among, made = dict[int, list[int]](), dict[int, list[int]](), list[Keys]()
    for depth, layer in enumerate(model(every).layers):
        attention: Any = layer.attention
        x = drawn(1, T, 48, seed=depth)
        makes, chooses = depth in (0, 3), depth != 1
        assert (attention.compressor.pool is not None, attention.compressor.index is not None) == (makes, chooses)
        latent, key = attention.q_norm(attention.q_down(x[0])), attention.kv_norm(attention.kv(x[0]))
        made += [Keys(attention, x[0], at, of)] if makes else []
        keys, want = made[-1], []
        for t in range(T):
            q = turned(attention, attention.query_norm(attention.q_up(latent[t]).unflatten(-1, (4, -1))), at[t])
            if chooses:
                scores = scores_of(attention, x[0, t], latent[t], at[t], keys, keys.seen(t, of))
                if makes:
                    among[t] = best_blocks(scores, keys) if len(keys.closes) > BLOCKS * SIZE else list(scores)
                chosen[t] = highest({w: s for w, s in scores.items() if makes or w in among[t]})
            close = [turned(attention, key[s][None], at[s])[0] for s in range(max(0, t - WINDOW + 1), t + 1)
                     if of[s] == of[t]]  # fmt: skip
            both = torch.cat((torch.stack(close), keys.keys[chosen[t]]))
            weights = torch.cat((q @ both.T * attention.scale, attention.scores.sinks[:, None]), -1).softmax(-1)
            y = turned(attention, weights[:, :-1] @ both, -at[t]).flatten().unflatten(0, (2, -1))
            want.append(attention.output(torch.einsum("gh,glh->gl", y, attention.group).flatten()))
        near(attention(x, given)[0], torch.stack(want), 1e-10)


@pytest.mark.parametrize("every", [1, 2])
@torch.no_grad()
def test_caches_hold_keys_where_they_are_made_alone(model: Make, every: int) -> None:
    decoder, tokens = model(every), ids(31)
    near(in_parts(decoder, tokens, [9, 1, 1, 7, 1, 12]), decoder.hidden(tokens)[0], 1e-10)
    sizes = [sum(t.numel() for t in c.buffers.values()) for c in decoder.new_caches(1, 64)]
    near_alone = WINDOW * 12
    assert sizes[1] == sizes[2] == near_alone < sizes[0] == sizes[3]


def test_layers_up_to_the_first_make_their_own(model: Make) -> None:
    made = [layer.attention.compressor.makes for layer in model(2, first=2).layers]
    assert made == [True, True, True, False]


def test_keys_learn_from_all_layers_that_read_them_and_each_index_from_its_own(model: Make) -> None:
    decoder, tokens = model(2).train(), ids(31)
    hidden, routings = decoder.hidden(tokens)
    hidden.square().sum().backward()
    first, third = (decoder.layers[i].attention.compressor for i in (0, 2))
    assert first.pool.value.weight.grad.norm() > 0 and first.index_key.weight.grad is None
    losses = {i: r.losses for i, r in enumerate(routings) if r is not None and "index_kl" in r.losses}
    assert set(losses) == {0, 2, 3}
    decoder.zero_grad()
    losses[2]["index_kl"].backward()
    assert third.index.query.weight.grad.norm() > 0 and first.index.query.weight.grad is None
    assert first.index_key.weight.grad.norm() > 0 and first.pool.value.weight.grad is None


def test_a_reader_without_a_maker_below_is_refused(tiny: Make) -> None:
    compressor = {"name": "csa2", "every": 2, "keys": 3, **INDEX}
    node = {"name": "shared_kv", "n_heads": 4, "window": WINDOW, "compressor": compressor}
    layout = {"layout": {"attention": "near attention*"}, "variants": {"attention": {"near": {"compressor": None}}}}
    with pytest.raises(ConfigError, match="no layer below layer 1 lends such"):
        check(tiny(n_layers=3, attention=node, **layout))
    other = {"overrides": [{"layers": 0, "attention": {"compressor": {**compressor, "head_dim": 16}}}]}
    with pytest.raises(ConfigError, match="index 8"):
        check(tiny(n_layers=3, attention=node, **other))


def test_the_released_model_has_what_its_card_says() -> None:
    """Rows of its tables to the unit (``engram_num_embeddings``), 552B besides; and a cache of 890 bytes of FP4, which
    are 4 bits a number and 8 for each 16 of the keys and for each 32 of the index."""
    config = preset("deepseek_v4_1_flash")
    decoder = compose(config, device="meta")
    tables = [m.table.num_embeddings for layer in decoder.layers if (m := layer.memory) is not None]
    assert tables == [384006168, 384016682]
    total = sum(p.numel() for p in decoder.parameters())
    assert round((total - sum(tables) * 256) / 1e9) == 552
    held = [
        [[t.numel() for name, t in cache.buffers.items() if "means" in name] for cache in decoder.new_caches(1, length)]
        for length in (2048, 4096)
    ]
    grown = [[(b - a) / 2048 for a, b in zip(*pair, strict=True)] for pair in zip(*held, strict=True)]
    sources, ratios = (2, 8, 14, 20), (2, 2, 2, 1)  # kv_source_layer_ids, compress_ratios
    assert [(i, g) for i, g in enumerate(grown) if g] == [
        (i, [512 / r, 128 / r]) for i, r in zip(sources, ratios, strict=True)
    ]
    assert sum(keys * (4 / 8 + 1 / 16) + index * (4 / 8 + 1 / 32) for keys, index in filter(None, grown)) == 890
    ranking = [i for i, layer in enumerate(decoder.layers) if getattr(layer.attention.compressor, "index", None)]
    assert ranking == [2, 8, 14, 20, 24, 28, 32, 36]  # index_source_layer_ids
