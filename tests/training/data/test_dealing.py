"""Rows with budgets of tokens and of tiles, and batches whose tiles are dealt evenly to processes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pictures import SIGHT, gradient, record, written

from blockwright.plugins.vision.data.picture_conversations import PictureConversations
from blockwright.plugins.vision.data.picture_module import PictureDataModule
from blockwright.registry import ConfigError
from blockwright.training.data.chat.plain import Plain
from blockwright.training.data.dealing import DealtOrder, deal
from blockwright.training.data.modules.corpus import Batching
from blockwright.training.data.order import EpochBatches
from blockwright.training.data.rows import RowOrder, best_fit
from blockwright.training.data.tokenizers.bytes import Bytes

loads = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60))
def test_rows_keep_two_budgets(items: list[tuple[int, int]]) -> None:
    lengths, tiles = (np.array(each) for each in zip(*items, strict=True))
    rows = best_fit(lengths, 20, tiles, 9)
    assert sorted(item for row in rows for item in row) == list(range(len(items)))
    filled = [(lengths[row].sum(), tiles[row].sum()) for row in rows]
    assert all(length <= 20 and load <= 9 for length, load in filled)
    assert sum(length <= 10 and load <= 4 for length, load in filled) <= 1  # two that fit into one would have been one
    assert best_fit(lengths, 20, 0 * tiles, 9) == best_fit(lengths, 20)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), loads.map(lambda found: found * n))), st.randoms())
def test_hands_have_equally_many_items_and_differ_by_one_load_at_most(
    dealt: tuple[int, list[int]], draw: random.Random
) -> None:
    n, values = dealt
    draw.shuffle(values)
    hands = deal(np.array(values), n)
    assert sorted(item for hand in hands for item in hand) == list(range(len(values)))
    assert {len(hand) for hand in hands} == {len(values) // n}
    sums = [sum(values[item] for item in hand) for hand in hands]
    assert max(sums) - min(sums) <= max(values)


def test_dealing_changes_who_sees_a_row_and_nothing_else_also_from_the_middle_on() -> None:
    tiles = np.random.RandomState(0).randint(0, 20, 50)
    alone = RowOrder(50, 8, 3)
    uneven, even = [], []
    for n in (1, 2, 4):
        order = DealtOrder(50, 8, 3, tiles, n)
        ranks = [list(EpochBatches(order, rank, n)) for rank in range(n)]
        assert [list(EpochBatches(order, rank, n, start=4)) for rank in range(n)] == [rows[4:] for rows in ranks]
        for parts, rows in zip(zip(*ranks, strict=True), alone.epoch(0), strict=True):
            assert sorted(itertools.chain(*parts)) == sorted(rows)
            even.append(np.ptp([tiles[part].sum() for part in parts]))
            uneven.append(np.ptp([tiles[part].sum() for part in np.split(rows, n)]))
    assert list(EpochBatches(DealtOrder(50, 8, 3, tiles))) == list(EpochBatches(alone))
    assert sum(even) < 0.3 * sum(uneven)


@pytest.fixture
def made(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., PictureDataModule]:
    """The module of thirty conversations with pictures of one, two and three tiles, and five of text."""
    for name, size in (("small", (10, 10)), ("wide", (32, 16))):
        gradient(*size).save(tmp_path / f"{name}.png")
    records = [record(f"<image>{n}", ("small.png", "wide.png")[n % 2]) for n in range(30)]
    files = written(tmp_path, records + [record(f"text {n}") for n in range(5)])
    model = tiny(**{**SIGHT, "max_positions": 256})

    def make(**how: Any) -> PictureDataModule:
        corpus = PictureConversations(files, 0.2, 0.0)
        batching = Batching(Bytes(258), 128, 2, corpus=corpus, cache_dir=str(tmp_path / "cache"))
        found = PictureDataModule(batching, Plain(), model, **how)
        found.prepare_data()
        found.setup("fit")
        return found

    return make


def test_batches_keep_the_budget_of_tiles_and_hold_every_conversation(made: Callable[..., PictureDataModule]) -> None:
    fitted, free = made(row_tiles=4), made()
    rows, freely = (each._packed("train", 128) for each in (fitted, free))
    assert rows.row_tiles.max() <= 4 < freely.row_tiles.max() and len(rows) > len(freely)
    assert sorted(item for row in rows.rows for item in row) == list(range(28))
    for row in range(len(rows)):
        batch = rows.__getitems__([row])
        assert len(batch["images.tiles"]) == max(rows.row_tiles[row], 1)
        assert sum(1 if grid == [1, 1] else 3 for grid in batch["images.grids"].tolist()) == rows.row_tiles[row]
    assert fitted.state_dict()["row_tiles"] == 4 and "row_tiles" not in free.state_dict()
    with pytest.warns(UserWarning, match="row_tiles was None, is 4"):
        fitted.load_state_dict(free.state_dict())


def test_conversation_of_more_tiles_than_a_row_is_refused_by_its_line(made: Callable[..., PictureDataModule]) -> None:
    with pytest.raises(ConfigError, match=r"chats.jsonl:\d+ has 3 tiles.*row_tiles=3"):
        made(row_tiles=2)
