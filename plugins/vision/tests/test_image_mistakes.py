"""Mistakes with pictures: one message with path, value, rule and remedy, before any training.

Each case is a record of a file, overrides, or both. The configuration is composed once, and the checks of the entry
point are called.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from blockwright.registry import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import Run
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import check

BASE = [
    *("experiment=vl2_small", "data=images", "callbacks=default", "test=false"),
    *("data.corpus.files={tmp}/good.jsonl", "data.corpus.val_fraction=0", "data.corpus.test_fraction=0"),
    *("data.batch_size=1", "data.cache_dir={tmp}/cache", "data.tokenizer.vocab_size=258", "trainer.max_steps=99"),
]


class Mistake(NamedTuple):
    """What is given, and what the message has to say.

    record: of the file; text is written as it is; None for a good one
    given: overrides, separated by spaces; {tmp} is the folder
    path: of the value at fault
    says: a pattern that value, rule and remedy together match
    early: whether it is found before Lightning is imported
    """

    record: Any
    given: str
    path: str
    says: str
    early: bool = True


def shows(*images: Any, content: Any = "<image>read:", answer: str = "7", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), **columns}


def of_file(name: str, says: str, early: bool = False) -> Mistake:
    """A record with a picture that cannot be used."""
    return Mistake(shows(name), "", "data.corpus.files", rf"{re.escape(name)}.*{says}", early)


def of_record(record: Any, says: str, early: bool = True) -> Mistake:
    return Mistake(record, "", "data.corpus.files", rf"\.jsonl:1.*{says}", early)


PARTS = [{"type": "image"}, {"type": "text", "text": "read:"}]
FILES = {
    "animated GIF": of_file("animated.gif", "2 frames"),
    "animated PNG": of_file("animated.png", "2 frames"),
    "animated WebP": of_file("animated.webp", "2 frames"),
    "TIFF of two pages": of_file("pages.tif", "2 frames"),
    "PNG cut off": of_file("cut.png", "cannot be read"),
    "JPEG cut off": of_file("cut.jpg", "cannot be read"),
    "text named as a picture": of_file("text.png", "cannot be read.*PNG, JPEG"),
    "vector graphics": of_file("drawing.svg", "cannot be read"),
    "program in PostScript": of_file("program.eps", "cannot be read"),
    "empty file": of_file("empty.png", "cannot be read"),
    "billions of pixels": of_file("bomb.png", "has more than 33,554,432 pixels.*smaller"),
    "no pixels": of_file("zero.ppm", "cannot be read|no pixels"),
    "floating-point pixels": of_file("float.tif", "floating-point"),
    "pixels of 32 bits": of_file("deep.tif", "more than 16 bits"),
    "thinner than a pixel": of_record(shows("thin.png"), "2000 × 1.*thinner than a pixel on a tile of 28", False),
    "missing file": of_record(shows("absent.png"), "absent.png does not exist"),
    "folder for a file": of_record(shows("folder"), "folder is a folder"),
}
RECORDS = {
    "more <image> than pictures": of_record(shows("good.png", content="<image><image>"), r"more <image>.*\(2, 1\)"),
    "fewer <image> than pictures": of_record(shows("good.png", "good.png"), "1 of its pictures have no <image>"),
    "picture without <image>": of_record(shows("good.png", content="read:"), "1 of its pictures have no <image>"),
    "<image> without a picture": of_record(shows(), r"more <image>.*\(1, 0\)"),
    "<image> in an answer": of_record(shows("good.png", answer="<image>"), "an answer holds <image>"),
    "image part without a picture": of_record(shows(content=PARTS), r"more <image>.*\(1, 0\)"),
    "images that are no list": of_record({**shows(), "images": "good.png"}, "must be a list of paths: good.png"),
    "image that is a number": of_record(shows(3), "needs a path, a text: 3"),
    "image without a name": of_record(shows(""), "needs a path"),
    "image stored in the record": of_record(shows({"bytes": "iVBO", "path": None}), "stored in the record.*as a file"),
    "image on the web": of_record(shows("https://example.org/a.png"), "is an address.*Fetch"),
    "image in the text": of_record(shows("data:image/png;base64,iVBO"), "is an address"),
    "path out of the folder": of_record(shows("../outside.png"), r"outside .*data\.corpus\.folder=…"),
    "path from the root": of_record(shows("/etc/hostname"), "/etc/hostname is outside"),
    "link out of the folder": of_record(shows("link.png"), "link.png is outside"),
    "link to itself": of_record(shows("loop.png"), "no path of a file|does not exist"),
    "path with a zero": of_record(shows("a\0.png"), "no path of a file"),
    "column of one image": of_record({**shows(), "image": "good.png"}, '"image" is not read.*"images"'),
    "videos": of_record(shows("good.png", videos=["a.mp4"]), '"videos" is not read'),
    "part that is a video": of_record(shows("good.png", content=[{"type": "video"}]), "no text and no image"),
    "part that names its picture": of_record(
        shows("good.png", content=[{"type": "image", "image": "good.png"}]), "the path of its picture in"
    ),
    "part without a text": of_record(shows("good.png", content=[*PARTS, {"type": "text"}]), "no text and no image"),
    "part that is a word": of_record(shows("good.png", content=["<image>"]), "no text and no image"),
    "record without messages": of_record({"images": ["good.png"]}, "needs messages"),
    "record that is a list": of_record([shows("good.png")], "must be a mapping"),
    "line that is no JSON": of_record("{images: [good.png]}", "no line of JSON"),
    "pictures without an answer": of_record(
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["good.png"]}, "no scored token"
    ),
    "picture longer than a row": Mistake(
        None, "data.sequence_length=8", "data.corpus.files", r"good\.jsonl:1.*first turns fit", False
    ),
}
SETTINGS = {
    "model that reads text alone": Mistake(None, "model.images=null", "model.images", "reads text alone"),
    "image token of a letter": Mistake(
        None, "model.images.image_token=65", "model.images.image_token", "another token"
    ),
    "image token that ends texts": Mistake(
        None, "model.images.image_token=256", "model.images.image_token", "another token"
    ),
    "image token beyond the vocabulary": Mistake(
        None, "model.images.image_token=258", "model.images.image_token", "below vocab_size"
    ),
    "no tile in a row": Mistake(None, "data.row_tiles=0", "data.row_tiles", "at least 1"),
    "fewer tiles in a row than in a picture": Mistake(
        None, "data.row_tiles=2", "data.row_tiles", r"good\.jsonl:1 has 3 tiles.*row_tiles=3", False
    ),
    "misspelt key": Mistake(None, "+data.row_tilez=2", "data.row_tilez", "row_tiles"),
    "folder of pictures that is none": Mistake(
        None, "data.corpus.folder={tmp}/absent", "data.corpus.folder", "no such folder"
    ),
    "corpus without pictures": Mistake(
        None,
        "data=chat data.name=images",
        "data.corpus",
        "conversations with pictures",
    ),
    "pictures for a chat of text": Mistake(
        None, "data=chat", "data.corpus.files", r"good\.jsonl:1.*has images.*data=images"
    ),
    "patch larger than the tile": Mistake(None, "model.vision.patch=29", "model.vision.patch", "larger than the tile"),
    "heads that do not divide": Mistake(None, "model.vision.n_heads=5", "model.vision.n_heads", "divide width"),
    "squares larger than the tile": Mistake(None, "model.projector.ratio=5", "model.projector.ratio", "side"),
    "no tile": Mistake(None, "model.tiling.max_tiles=0", "model.tiling.max_tiles", "at least 1"),
    "tower of experts": Mistake(None, "~model.vision.ffn", "model.vision.ffn", "dense"),
    "folder without a tower": Mistake(None, "tower=siglip tower.folder={tmp}", "tower.folder", "safetensors"),
    "tower that is a number": Mistake(None, "tower=siglip tower.folder=3", "tower.folder", "must be a path"),
}


def pictures(folder: Path) -> None:
    """The files that records name."""
    good = Image.fromarray(np.arange(56 * 28, dtype=np.uint32).astype(np.uint8).reshape(28, 56))
    good.save(folder / "good.png")
    good.save(folder.parent / "outside.png")
    turned = good.rotate(180)
    for name in ("animated.gif", "animated.png", "animated.webp", "pages.tif"):
        good.save(folder / name, save_all=True, append_images=[turned])
    for name in ("cut.png", "cut.jpg"):
        good.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-60])
    Image.new("L", (2000, 1)).save(folder / "thin.png")
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((8, 8), 1 << 20, dtype=np.int32)).save(folder / "deep.tif")
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    texts = {
        "text.png": b"no picture",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "empty.png": b"",
        "bomb.png": b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")),
        "zero.ppm": b"P6 0 0 255\n",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    (folder / "folder").mkdir()
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")


def overrides(name: str, mistake: Mistake, folder: Path) -> list[str]:
    """The command line of a mistake, whose record is written."""
    given = mistake.given.replace("{tmp}", str(folder)).split()
    if mistake.record is None:
        return given
    file = folder / f"{zlib.crc32(name.encode())}.jsonl"
    file.write_text(mistake.record if isinstance(mistake.record, str) else json.dumps(mistake.record))
    return [*given, f"data.corpus.files={file}"]


def common(folder: Path) -> list[str]:
    return [part.replace("{tmp}", str(folder)) for part in BASE]


def files(folder: Path) -> None:
    pictures(folder)
    (folder / "good.jsonl").write_text(json.dumps(shows("good.png")) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "pictures"
    folder.mkdir()
    files(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> DictConfig:
    return compose_config(common(folder), output_dir=str(folder / "run"))


def changed(base: DictConfig, given: list[str], folder: Path) -> DictConfig:
    """The configuration with overrides: of single values quickly, as Hydra would set them."""
    if any("." not in override.partition("=")[0] for override in given):
        return compose_config([*common(folder), *given], output_dir=str(folder / "run"))
    cfg = base.copy()
    OmegaConf.set_struct(cfg, False)
    for override in given:
        path, _, value = override.lstrip("+~").partition("=")
        if override.startswith("~"):
            node, _, key = path.rpartition(".")
            del OmegaConf.select(cfg, node)[key]
        else:
            OmegaConf.update(cfg, path, yaml.safe_load(value))
    return cfg


@pytest.mark.parametrize("name", SETTINGS)
def test_mistake_in_settings_is_one_message_before_training(name: str, base: DictConfig, folder: Path) -> None:
    mistake = SETTINGS[name]
    cfg = changed(base, overrides(name, mistake, folder), folder)
    with pytest.raises(ConfigError) as caught:
        run = checked(cfg)
        assert not mistake.early, "found too late"
        data = parts.build("data", run)
        data.prepare_data()
        data.setup("fit")
    assert_said(mistake, caught.value, folder)


def test_mistake_in_files_and_records_is_one_message(base: DictConfig, folder: Path) -> None:
    """What is early is found by the check of the data, which the check of a run calls."""
    good = checked(base)
    for name, mistake in {**FILES, **RECORDS}.items():
        settings = dict(override.split("=", 1) for override in overrides(name, mistake, folder))
        given = {**good.data, "corpus": {**good.data["corpus"], "files": settings.get("data.corpus.files", "")}}
        if mistake.record is None:
            given = {**good.data, "sequence_length": int(settings["data.sequence_length"])}
        with pytest.raises(ConfigError) as caught, warnings.catch_warnings():
            warnings.simplefilter("error")
            data: Any = parts.build("data", replace(good, data=given))
            data.check()
            assert not mistake.early, f"{name} is found too late"
            data.prepare_data()
            data.setup("fit")
        assert_said(mistake, caught.value, folder)


def assert_said(mistake: Mistake, error: ConfigError, folder: Path) -> None:
    assert error.path == mistake.path.replace("{tmp}", str(folder)), str(error)
    assert re.search(mistake.says, f"{error.value} {error.rule}. {error.remedy}"), str(error)


def checked(cfg: DictConfig) -> Run:
    run = parse_settings(cfg)
    check(run)
    for start in parts.starts(run):
        start.check(run.model)
    return run


def test_good_pictures_pass(base: DictConfig, folder: Path) -> None:
    for given in ([], [f"data.corpus.folder={folder}"], ["data.row_tiles=3"]):
        data: Any = parts.build("data", checked(changed(base, given, folder)))
        data.prepare_data()
        data.setup("fit")
        assert data.order.n_windows == 1
