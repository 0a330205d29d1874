"""A checkpoint that is not what was written is known, whichever bit of it is another."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint import manifest
from blockwright.blocks.checkpoint.read import read_checkpoint, read_file
from blockwright.registry import ConfigError

STATE = {"weights": torch.arange(64.0), "step": 7, "names": ["a", "b"]}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    return save(tmp_path / "some.ckpt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards.ckpt"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "__0_0.distcp").write_bytes(bytes(range(256)))
    (folder / "meta.pt").write_bytes(b"more")
    manifest.seal_folder(folder)
    return folder


def save(path: Path, state: Any = STATE) -> Path:
    with path.open("wb") as file:
        sealing = manifest.Sealing(file)
        torch.save(state, sealing)
        sealing.seal()
    return path


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_sealed_file_is_known_and_torch_reads_it(sealed: Path) -> None:
    assert manifest.check(sealed)
    for mapped in (False, True):
        assert torch.equal(read_file(sealed, mapped=mapped)["weights"], STATE["weights"])  # type: ignore[arg-type]


def test_file_of_another_program_has_no_seal_and_is_no_damage(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.pt")
    (tmp_path / "text").write_text("no zip")
    assert not manifest.check(tmp_path / "plain.pt") and not manifest.check(tmp_path / "text")
    with (tmp_path / "x").open("wb") as file:
        sealing = manifest.Sealing(file)
        sealing.write(b"no zip")
        with pytest.raises(ValueError, match="only a zip"):
            sealing.seal()


def test_any_flipped_bit_of_a_file_or_a_cut_is_noticed(sealed: Path) -> None:
    whole, draw = sealed.read_bytes(), random.Random(0)
    bits = range(8 * len(whole))
    ends = [*bits[:24], *bits[-8 * (manifest._TRAILER_BYTES + 22) :: 5]]  # the first bytes, the zip's end, the digest
    for bit in [*ends, *draw.sample(bits, 100)]:
        flip(sealed, bit)
        with pytest.raises(manifest.Damaged):
            manifest._check_file.__wrapped__(sealed, (0, 0, bit, len(whole)))
        sealed.write_bytes(whole)
    assert manifest._check_file.__wrapped__(sealed, (0, 0, 0, len(whole)))
    for length in (1, 21, 84, 200, 1000):
        sealed.write_bytes(whole[:-length])
        with pytest.raises(manifest.Damaged):
            manifest.check(sealed)


def test_any_flipped_bit_of_a_folder_is_noticed(folder: Path) -> None:
    for file in (p for p in folder.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for bit in random.Random(1).sample(range(8 * len(whole)), 30):
            flip(file, bit)
            with pytest.raises(manifest.Damaged):
                manifest.check(folder)
            file.write_bytes(whole)
    assert manifest.check(folder)


def test_stray_files_and_links_in_a_folder_are_ignored_and_may_go(folder: Path) -> None:
    strays = [".nfs0000000000a1b2c3", ".DS_Store", "note.txt", "inner/._x"]
    for stray in strays:
        (folder / stray).write_text("")
    (folder / "current").symlink_to("/etc/hostname")
    assert manifest.check(folder)
    (folder / "current").unlink()
    manifest.seal_folder(folder)
    for stray in strays[:2]:
        (folder / stray).unlink()
    assert manifest.check(folder)


def lacks(folder: Path) -> None:
    (folder / "inner" / "__0_0.distcp").unlink()


def links_a_file(folder: Path) -> None:
    (folder / "meta.pt").unlink()
    (folder / "meta.pt").symlink_to("/etc/hostname")


def links_a_folder(folder: Path) -> None:
    (folder / "inner").rename(folder.parent / "elsewhere")
    (folder / "inner").symlink_to(folder.parent / "elsewhere")


def outside(folder: Path, name: str = "../outside") -> None:
    (folder.parent / "outside").write_text("x")
    (folder / manifest.MANIFEST).write_text(manifest._canonical({name: {"bytes": 1, "sha256": "0"}}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lacks, r"inner/__0_0\.distcp"),
        (links_a_file, "is a link"),
        (links_a_folder, "is a link"),
        *((lambda folder, name=name: outside(folder, name), "changed") for name in ("../outside", "/etc/hostname", "")),
    ],
)
def test_folder_that_is_not_its_manifests_is_damaged(folder: Path, change: Callable[[Path], None], named: str) -> None:
    change(folder)
    with pytest.raises(manifest.Damaged, match=named):
        manifest.check(folder)


def test_verdict_is_remembered_until_the_file_changes(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert manifest.check(sealed)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_sha256", lambda *_: pytest.fail("read again"))
        assert manifest.check(sealed)
    sealed.write_bytes(sealed.read_bytes()[:-1] + b"0")
    with pytest.raises(manifest.Damaged):
        manifest.check(sealed)


def test_damage_is_refused_before_anything_is_unpickled(
    sealed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".metadata").write_bytes(b"no pickle")
    manifest.seal_folder(folder)
    flip(folder / ".metadata", 3)
    flip(sealed, 8 * 500)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    for read, path in ((read_file, sealed), (read_checkpoint, folder)):
        with pytest.raises(ConfigError, match="is damaged"):
            read(path)


def test_address_is_no_checkpoint() -> None:
    for address in ("http://host/x.ckpt", "https://host/x.ckpt", "s3://b/x.ckpt", "file:///x.ckpt"):
        with pytest.raises(ConfigError, match="is a URL"):
            read_file(address)
