"""Conversations with pictures: files of every sort, cutting, places, batches, and pages of digits."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blockwright.blocks.compose import compose
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.plugins.vision.data.pages import Pages
from blockwright.plugins.vision.data.picture_conversations import PictureConversations, boxes, overlap
from blockwright.plugins.vision.data.picture_module import PictureDataModule
from blockwright.plugins.vision.data.picture_rows import images_of
from blockwright.plugins.vision.data.pictures import PIXELS, Files, open_picture, tiles_of
from blockwright.registry import ConfigError
from blockwright.training.data.chat.formats import Plain
from blockwright.training.data.modules.text import Batching
from blockwright.training.data.tokenizers.tokenizer import Bytes

IMAGE = 257
TOWER = {"name": "siglip", "tile": 16, "patch": 4, "width": 16, "depth": 1, "n_heads": 2, "norm": "layernorm"}
SIGHT: dict[str, Any] = {"images": {"name": "early_fusion", "image_token": IMAGE}, "vocab_size": 258}
SIGHT |= {"vision": {**TOWER, "ffn": {"name": "gelu", "d_ff": 16}}, "projector": "downsample_mlp", "tiling": "grid_2d"}


@pytest.fixture
def model(tiny: Callable[..., Any]) -> dict[str, Any]:
    return tiny(**{**SIGHT, "max_positions": 256})


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack((x % 256, y % 256, (x + y) % 256), -1).astype(np.uint8))


# --- files ------------------------------------------------------------------------------------------------------------


def test_pictures_of_every_mode_are_read_as_rgb(tmp_path: Path) -> None:
    page = gradient(40, 20)
    for mode, ending in (("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg")):
        page.convert(mode).save(tmp_path / f"x.{ending}")
        found = open_picture(tmp_path / f"x.{ending}")
        assert (found.mode, found.size) == ("RGB", (40, 20)), mode
    Image.fromarray(np.full((4, 6), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(np.asarray(open_picture(tmp_path / "deep.png"))).tolist() == [0x80]
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn to the right
    page.save(tmp_path / "turned.jpg", exif=turned)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 40)


def gif(side: int) -> bytes:
    """A picture of side² pixels in 35 bytes: its one frame has one, and a reader fills the rest."""
    size, frame = struct.pack("<HH", side, side), struct.pack("<HH", 1, 1)
    return b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + frame + b"\0\x02\x02D\x01\0;"


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    half, palette = Image.new("RGBA", (2, 1), (200, 0, 0, 255)), Image.new("P", (2, 1), 1)
    half.putpixel((1, 0), (0, 0, 0, 0))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((1, 0), 0)
    grey = Image.new("LA", (2, 1), (9, 255))
    grey.putpixel((1, 0), (9, 0))
    half.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=0)
    palette.save(tmp_path / "c.gif", transparency=0)
    grey.save(tmp_path / "d.png")
    Image.new("L", (2, 1), 77).save(tmp_path / "e.png", transparency=77)
    for name, first in (("a.png", 200), ("b.png", 200), ("c.gif", 200), ("d.png", 9), ("e.png", 255)):
        found = open_picture(tmp_path / name)
        assert found.mode == "RGB" and found.getpixel((1, 0)) == (255, 255, 255), name
        assert found.getpixel((0, 0))[0] == first, name  # type: ignore[index]
    half.putpixel((1, 0), (0, 0, 0, 51))
    half.save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((1, 0)) == (204, 204, 204)


def test_sixteen_bits_mean_what_the_file_declares(tmp_path: Path) -> None:
    for most, value in ((65535, 255), (65535, 65535), (4095, 4095), (1000, 250)):
        (tmp_path / "x.pgm").write_bytes(b"P5 2 1 %d\n" % most + struct.pack(">HH", value, 0))
        assert abs(open_picture(tmp_path / "x.pgm").getpixel((0, 0))[0] - 255 * value / most) <= 1, (most, value)  # type: ignore[index]
    for name, value in (("x.png", 4095), ("x.tif", 255)):
        Image.fromarray(np.full((2, 2), value, dtype=np.uint16)).save(tmp_path / name)
        with pytest.raises(ConfigError, match="declares 16 bits, and its largest value is"):
            open_picture(tmp_path / name)
    Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(tmp_path / "black.png")
    assert open_picture(tmp_path / "black.png").getpixel((0, 0)) == (0, 0, 0)


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (
        ("pipe.png", "no ordinary file"),
        (".", "is a folder"),
        ("a" * 5000, "cannot be found"),
        ("a\0.png", "cannot be found"),
        ("none.png", "does not exist"),
        ("/dev/zero", "no ordinary file"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            open_picture(tmp_path / name)
        assert len(str(caught.value)) < 600


MEASURED = """
import resource, sys
from pathlib import Path
from blockwright.registry import ConfigError
from blockwright.plugins.vision.data.pictures import Files
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        print(sum(1 for _ in Files("here", [path] * 4)))
    except ConfigError as error:
        print(error.rule)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_a_file_says(tmp_path: Path) -> None:
    """A picture of 81 million pixels in 35 bytes is refused unopened; of four large ones, one is held at a time."""
    (tmp_path / "bomb.gif").write_bytes(gif(9000))
    Image.new("P", (5000, 5000)).save(tmp_path / "large.gif")
    files = [str(tmp_path / name) for name in ("bomb.gif", "large.gif")]
    found = subprocess.run([sys.executable, "-c", MEASURED, *files], capture_output=True, text=True, check=True)
    refused, used, opened, used_by_large = found.stdout.splitlines()
    assert refused == f"has more than {PIXELS:,} pixels" and int(used) < 40
    assert opened == "4" and int(used_by_large) < 300  # megabytes; one takes 125, and the next while it is replaced


def test_pixels_of_a_conversation_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(10, 10).save(tmp_path / "x.png")
    monkeypatch.setattr("blockwright.plugins.vision.data.pictures.TOGETHER", 250)
    with pytest.raises(ConfigError, match=r"chat.jsonl:3.*more than 250 pixels"):
        list(Files("chat.jsonl:3", [tmp_path / "x.png"] * 3))
    assert len(list(Files("chat.jsonl:3", [tmp_path / "x.png"] * 2))) == 2
    monkeypatch.setattr("blockwright.plugins.vision.data.pictures.PIXELS", 99)
    with pytest.raises(ConfigError, match="has more than 99 pixels"):
        open_picture(tmp_path / "x.png")


def test_tiles_are_the_thumbnail_and_then_the_canvas_row_by_row(model: dict[str, Any]) -> None:
    images: Any = images_of(model)
    page = gradient(48, 32)
    assert images.tiling.grid(48, 32) == (3, 2)
    found = tiles_of(page, images.tiling.grid(48, 32), images.vision, images.tiling)
    assert found.shape == (7, 3, 16, 16)
    pixels = np.asarray(page).transpose(2, 0, 1)  # the picture is as large as its canvas
    for n, tile in enumerate(found[1:]):
        y, x = n // 3 * 16, n % 3 * 16
        assert np.array_equal(tile, pixels[:, y : y + 16, x : x + 16])
    bars = found[0][:, [0, 1, 14, 15]]  # 16 × 10 or 11 of 16 rows show the picture
    assert (bars == 127).all()


# --- batches ----------------------------------------------------------------------------------------------------------


def written(folder: Path, records: list[dict[str, Any]]) -> str:
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder / "chats.jsonl")


def record(content: Any, *images: Any, answer: str = "yes") -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": list(images)} if images else {})}


def module(folder: Path, records: list[dict[str, Any]], model: dict[str, Any], length: int = 96) -> PictureDataModule:
    corpus = PictureConversations(written(folder, records), 0.0, 0.0)
    batching = Batching(Bytes(258), length, 1, corpus=corpus, cache_dir=str(folder / "cache"))
    made = PictureDataModule(batching, Plain(), model)
    made.prepare_data()
    made.setup("fit")
    return made


def test_a_batch_has_places_tiles_and_grids_that_the_model_takes(model: dict[str, Any], tmp_path: Path) -> None:
    for name, size in (("wide", (64, 32)), ("small", (10, 10))):
        gradient(*size).save(tmp_path / f"{name}.png")
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    records = [record(parts, "small.png", {"path": "wide.png"}), record("plain text")]
    made = module(tmp_path, records, model)
    tiling = made.images.tiling
    grids = [tiling.grid(10, 10, 2), tiling.grid(64, 32, 2)]
    batches = [made._packed("train", 96).__getitems__([row]) for row in range(len(made._packed("train", 96)))]
    batch = batches[0]
    assert batch["images.grids"].tolist() == [list(grid) for grid in grids]
    tiles = batch["images.tiles"]
    assert tiles.shape == (1 + 1 + grids[1][0] * grids[1][1], 3, 16, 16) and tiles.dtype == torch.uint8
    ids = batch["tokens"][0].tolist()
    first, second = map(tiling.count, grids)
    start = ids.index(IMAGE)
    assert ids[start - 1] == ord("a") and ids[start : start + first] == [IMAGE] * first
    assert ids[start + first] == ord("b") and ids[start + first + 1 :].count(IMAGE) == second
    targets = batch["targets"][batch["targets"] != IGNORED].tolist()
    assert IMAGE not in targets and bytes(t for t in targets if t < 256).count(b"yes") == targets.count(256)
    decoder = compose(model)
    given = (batch["tokens"], batch["positions"], batch["segments"])
    assert torch.isfinite(decoder(*given, media=decoder.media(batch))).all()


def test_a_batch_without_pictures_gives_the_image_side_gradients_of_zero(model: dict[str, Any], tmp_path: Path) -> None:
    made = module(tmp_path, [record("plain text")], model)
    batch = made._packed("train", 96).__getitems__([0])
    assert batch["images.tiles"].shape == (1, 3, 16, 16) and batch["images.grids"].shape == (0, 2)
    decoder = compose(model)
    hidden = decoder.hidden(batch["tokens"], batch["positions"], batch["segments"], media=decoder.media(batch))[0]
    assert torch.equal(hidden, decoder.hidden(batch["tokens"], batch["positions"], batch["segments"])[0])
    decoder.nll(hidden, batch["targets"]).backward()
    for name, parameter in decoder.images.named_parameters():  # type: ignore[union-attr]
        assert parameter.grad is not None and not parameter.grad.any(), name


# --- rows keep a budget of tiles --------------------------------------------------------------------------------------


@pytest.fixture
def made(model: dict[str, Any], tmp_path: Path) -> Callable[..., PictureDataModule]:
    """A module of thirty conversations with pictures of one, two and three tiles, and five of text."""
    for name, size in (("small", (10, 10)), ("wide", (32, 16))):
        gradient(*size).save(tmp_path / f"{name}.png")
    records = [record(f"<image>{n}", ("small.png", "wide.png")[n % 2]) for n in range(30)]
    files = written(tmp_path, records + [record(f"text {n}") for n in range(5)])

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


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_constant_box_of_a_size_is_right_on_more_training_pages_than_other_boxes() -> None:
    pages = Pages(train=300, held_out=1, where=1.0, single=0.0)
    said = [(page, turn["content"]) for page in pages.conversations("train") for turn in page.messages]
    asked = [(page, answer) for page, answer in said if answer.startswith("[")]
    wide = [(page, boxes(answer)[0]) for page, answer in asked if page.columns["grid"] == [2, 1]]
    shares = [sum(overlap(box, other) >= 0.5 for _, other in wide) for _, box in wide]
    judged = [pages.judge(page, "where 0:", "[[0, 0, 0, 0]]", answer).figures for page, answer in asked]
    constant = [f["constant"] for f, (page, _) in zip(judged, asked, strict=True) if page.columns["grid"] == [2, 1]]
    assert sum(constant) == max(shares) < len(wide) and not any(f["found"] for f in judged)


def test_pages_show_what_their_answers_say_with_digits_of_their_split_alone() -> None:
    pages = Pages(train=40, held_out=20, where=1.0)
    seen: dict[str, set[int]] = {}
    for split in ("train", "val", "test"):
        first, again = list(pages.conversations(split)), list(pages.conversations(split))
        assert first == again
        for each in first:
            columns, rows = each.columns["grid"]
            digits = each.columns["digits"]
            seen.setdefault(split, set()).update(sample for sample, _ in digits)
            answers = {q["content"].replace("<image>", ""): a["content"] for q, a in zip(*[iter(each.messages)] * 2)}  # noqa: B905
            shown = "".join(str(pages._labels[sample]) for sample, _ in digits)
            assert answers["read:"].replace("/", "").replace(" ", "") == shown
            assert len(answers["read:"]) == columns * rows + rows - 1
            (page,) = pages.pictures(each)
            assert page.size == (28 * columns, 28 * rows)
            ink = 255 - np.asarray(page.convert("L"))
            for _, (x1, y1, x2, y2) in digits:
                assert ink[y1:y2, x1:x2].max() > 100
                ink[y1:y2, x1:x2] = 0
            assert not ink.any()
            for question, answer in answers.items():
                if question.startswith("where"):
                    assert len(json.loads(answer)[0]) == 4 and max(json.loads(answer)[0]) <= 999
    assert not seen["train"] & (seen["val"] | seen["test"]) and not seen["val"] & seen["test"]
