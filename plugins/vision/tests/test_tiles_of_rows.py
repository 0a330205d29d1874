"""Rows of conversations with pictures keep a budget of tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pictures import SIGHT, gradient, record, written

from blockwright.plugins.vision.data.picture_conversations import PictureConversations
from blockwright.plugins.vision.data.picture_module import PictureDataModule
from blockwright.registry import ConfigError
from blockwright.training.data.chat.plain import Plain
from blockwright.training.data.modules.corpus import Batching
from blockwright.training.data.tokenizers.bytes import Bytes


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
