"""A cache's key is all that shaped it: pictures, and the places of their tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_pictures import SIGHT

from blockwright import registry
from blockwright.plugins.vision.data.pages import Pages
from blockwright.plugins.vision.data.picture_conversations import PictureConversations
from blockwright.plugins.vision.data.picture_rows import PictureRendering, images_of
from blockwright.training.data.corpus import SPLITS
from blockwright.training.data.packing import cache_key
from blockwright.training.data.tokenizers.tokenizer import Bytes
from tests.training.data.test_fingerprint import (
    DRAWN,
    ROOM,
    SMALL,
    assert_documents_apart,
    chat_of,
    keep_apart,
    talks,
    turns,
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two files of conversations and two folders of pictures."""
    for name, size in (("a", (60, 20)), ("b", (20, 60))):
        question = {"role": "user", "content": "<image>What?"}
        seen = [{"messages": [question, *turns(t)[1:]], "images": ["p.png"]} for t in talks(name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, seen)))
        (tmp_path / name).mkdir()
        Image.new("RGB", size, "red").save(tmp_path / name / "p.png")
    return tmp_path


def seen(corpus: Any) -> Any:
    """The pictures and messages of every conversation."""
    talks = [talk for split in SPLITS for talk in corpus.conversations(split)]
    return [[[picture.tobytes() for picture in corpus.pictures(talk)], talk.messages] for talk in talks]


def test_conversations_of_other_settings_have_another_key(files: Path) -> None:
    usual = {"files": str(files / "a.jsonl"), "folder": str(files / "a")}
    other = {"files": str(files / "b.jsonl"), "folder": str(files / "b"), **ROOM}
    assert_documents_apart(PictureConversations, usual, other, seen)


def test_pages_of_other_settings_have_another_key() -> None:
    other = {**DRAWN, "cell": 30, "blank": 0.9, "single": 0.9, "where": 0.9}
    assert_documents_apart(Pages, SMALL, other, seen)


def test_a_picture_changed_under_its_name_has_another_key(files: Path, tmp_path: Path) -> None:
    corpus = PictureConversations(str(files / "a.jsonl"), folder=str(tmp_path))
    keys = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "p.bmp")  # as large
        (tmp_path / "p.bmp").replace(tmp_path / "p.png")
        keys.add(corpus.fingerprint())
    assert len(keys) == 2


TILINGS: dict[str, dict[str, Any]] = {
    "grid_2d": {"max_tiles": 2, "most_images": 0, "global_view": "tail"},
    "native": {},
    "thumbnail": {},
}


@pytest.mark.parametrize("name", registry.names("tiling"))
def test_places_of_other_tilings_have_another_key(tiny: Callable[..., Any], name: str) -> None:
    assert set(registry.lookup("tiling", name).schema.parameters) == set(TILINGS[name])

    def make(kind: str, tile: int, **own: Any) -> tuple[str, Any]:
        sight = {**SIGHT, "vision": {**SIGHT["vision"], "tile": tile}, "tiling": {"name": kind, **own}}
        images = images_of(tiny(**sight, max_positions=1024))
        picture = Image.new("RGB", (90, 30))
        rendering = PictureRendering(images, lambda talk: [picture], Bytes(258), chat_of("plain"), 1024)
        talk = {"where": "a:1", "messages": turns([("user", "<image>"), ("assistant", "Yes.")]), "columns": {}}
        return cache_key("", rendering), (rendering.encode(json.dumps(talk)).tolist(), rendering.tiles)

    other = "thumbnail" if name != "thumbnail" else "native"
    key, places = make(name, 16)
    keep_apart(make, {"kind": name, "tile": 16}, {"tile": 32, **TILINGS[name]})
    assert make(other, 16)[0] != key and make(other, 16)[1] != places
