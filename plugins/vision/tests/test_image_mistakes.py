"""Mistakes with pictures: one message with path, value, rule and remedy, before any training."""

from __future__ import annotations

import json
import re
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def shows(*images: Any, content: Any = "<image>read:", answer: str = "7", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), **columns}


PARTS = [{"type": "image"}, {"type": "text", "text": "read:"}]
# A pattern of the message, and files that cannot be used, found when pictures are read.
FILES = {
    "2 frames": "animated.gif animated.png animated.webp pages.tif",
    "cannot be read.*PNG, JPEG": "cut.png cut.jpg text.png drawing.svg program.eps empty.png",
    "has more than 33,554,432 pixels": "bomb.png",
    "cannot be read|no pixels": "zero.ppm",
    "floating-point": "float.tif",
    "more than 16 bits": "deep.tif",
    "2000 × 1.*thinner than a pixel on a tile of 28": "thin.png",
}
# Records, found by the check of a run: line 1 of the file is named, and the pattern.
RECORDS: list[tuple[Any, str]] = [
    (shows("absent.png"), "absent.png does not exist"),
    (shows("folder"), "folder is a folder"),
    (shows("good.png", content="<image><image>"), r"more <image>.*\(2, 1\)"),
    (shows("good.png", "good.png"), "1 of its pictures have no <image>"),
    (shows("good.png", content="read:"), "1 of its pictures have no <image>"),
    (shows(), r"more <image>.*\(1, 0\)"),
    (shows("good.png", answer="<image>"), "an answer holds <image>"),
    (shows(content=PARTS), r"more <image>.*\(1, 0\)"),
    ({**shows(), "images": "good.png"}, "must be a list of paths: good.png"),
    (shows(3), "needs a path, a text: 3"),
    (shows(""), "needs a path"),
    (shows({"bytes": "iVBO", "path": None}), "stored in the record"),
    (shows("https://example.org/a.png"), "is an address"),
    (shows("data:image/png;base64,iVBO"), "is an address"),
    (shows("../outside.png"), "outside .*"),
    (shows("/etc/hostname"), "/etc/hostname is outside"),
    (shows("link.png"), "link.png is outside"),
    (shows("loop.png"), "no path of a file|does not exist"),
    (shows("a\0.png"), "no path of a file"),
    ({**shows(), "image": "good.png"}, '"image" is not read.*"images"'),
    (shows("good.png", videos=["a.mp4"]), '"videos" is not read'),
    (shows("good.png", content=[{"type": "video"}]), "no text and no image"),
    (shows("good.png", content=[{"type": "image", "image": "good.png"}]), "the path of its picture in"),
    (shows("good.png", content=[*PARTS, {"type": "text"}]), "no text and no image"),
    (shows("good.png", content=["<image>"]), "no text and no image"),
    ({"images": ["good.png"]}, "needs messages"),
    ([shows("good.png")], "must be a mapping"),
    ("{images: [good.png]}", "no line of JSON"),
    ({"messages": [{"role": "user", "content": "<image>"}], "images": ["good.png"]}, "no scored token"),
]
# Overrides, the path that is refused and a pattern; the blocks' own refusals are in test_images.py.
SETTINGS = [
    ("model.images=null", "model.images", "reads text alone"),
    ("model.images.image_token=65", "model.images.image_token", "another token"),
    ("model.images.image_token=256", "model.images.image_token", "another token"),
    ("model.vision.n_heads=5", "model.vision.n_heads", "divide"),
    ("data.row_tiles=0", "data.row_tiles", "at least 1"),
    ("+data.row_tilez=2", "data.row_tilez", "row_tiles"),
    ("data.corpus.folder={tmp}/absent", "data.corpus.folder", "no such folder"),
    ("data=chat data.name=images", "data.corpus", "conversations with pictures"),
    ("data=chat", "data.corpus.files", r"good\.jsonl:1.*has images.*data=images"),
    ("tower=siglip tower.folder={tmp}", "tower.folder", "safetensors"),
    ("tower=siglip tower.folder=3", "tower.folder", "must be a path"),
]
# Settings that only reading the pictures shows to be wrong.
LATE = {
    "row_tiles": (2, r"good\.jsonl:1 has 3 tiles.*row_tiles=3"),
    "sequence_length": (8, r"good\.jsonl:1.*first turns"),
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


def common(folder: Path) -> list[str]:
    return [part.replace("{tmp}", str(folder)) for part in BASE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "pictures"
    folder.mkdir()
    pictures(folder)
    (folder / "good.jsonl").write_text(json.dumps(shows("good.png")) + "\n")
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


def test_mistake_in_settings_is_one_message_before_training(base: DictConfig, folder: Path) -> None:
    for given, path, says in SETTINGS:
        with pytest.raises(ConfigError) as caught:
            checked(changed(base, given.replace("{tmp}", str(folder)).split(), folder))
        assert caught.value.path == path and re.search(says, said(caught.value)), given


def said(error: ConfigError) -> str:
    return f"{error.value} {error.rule}. {error.remedy}"


def read(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def test_mistake_in_files_and_records_is_one_message(base: DictConfig, folder: Path) -> None:
    """Records are found by the check of the data, which the check of a run calls; pictures when they are read."""
    good = checked(base)

    def data_of(**settings: Any) -> Any:
        return parts.build("data", replace(good, data={**good.data, **settings}))

    def corpus(record: Any) -> dict[str, Any]:
        file = folder / "record.jsonl"
        file.write_text(record if isinstance(record, str) else json.dumps(record))
        return {**good.data["corpus"], "files": str(file)}

    names = [(name, says) for says, files in FILES.items() for name in files.split()]
    late = [({"corpus": shows(name)}, rf"(\.jsonl:1|{re.escape(name)}).*({says})") for name, says in names]
    late += [({name: value}, says) for name, (value, says) in LATE.items()]
    for settings, says in [({"corpus": record}, rf"\.jsonl:1.*{says}") for record, says in RECORDS] + late:
        given = {k: corpus(v) if k == "corpus" else v for k, v in settings.items()}
        data = data_of(**given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if (settings, says) in late:
                data.check()
                with pytest.raises(ConfigError) as caught:
                    read(data)
            else:
                with pytest.raises(ConfigError) as caught:
                    data.check()
        path = "data.row_tiles" if "row_tiles" in settings else "data.corpus.files"
        assert caught.value.path == path and re.search(says, said(caught.value)), (settings, caught.value)


def checked(cfg: DictConfig) -> Run:
    run = parse_settings(cfg)
    check(run)
    for start in parts.starts(run):
        start.check(run.model)
    return run


def test_good_pictures_pass(base: DictConfig, folder: Path) -> None:
    for given in ([], [f"data.corpus.folder={folder}"], ["data.row_tiles=3"]):
        assert read(parts.build("data", checked(changed(base, given, folder)))).order.n_windows == 1
