"""A checkpoint that is not what was written is known, whichever bit of it is another."""

from __future__ import annotations

import random
import re
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


def test_any_flipped_bit_of_a_file_is_noticed(sealed: Path) -> None:
    whole, draw = sealed.read_bytes(), random.Random(0)
    bits = range(8 * len(whole))
    ends = [*bits[:24], *bits[-8 * (manifest._TRAILER_BYTES + 22) :: 5]]  # the first bytes, the zip's end, the digest
    for bit in [*ends, *draw.sample(bits, 100)]:
        flip(sealed, bit)
        with pytest.raises(manifest.Damaged):
            manifest._check_file.__wrapped__(sealed, (0, 0, bit, len(whole)))
        sealed.write_bytes(whole)
    assert manifest._check_file.__wrapped__(sealed, (0, 0, 0, len(whole)))


def test_any_flipped_bit_of_a_folder_is_noticed(folder: Path) -> None:
    for file in (p for p in folder.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for bit in random.Random(1).sample(range(8 * len(whole)), 30):
            flip(file, bit)
            with pytest.raises(manifest.Damaged):
                manifest.check(folder)
            file.write_bytes(whole)
    assert manifest.check(folder)


@pytest.mark.parametrize("length", [1, 21, 84, 200, 1000])
def test_file_cut_short_is_noticed(sealed: Path, length: int) -> None:
    sealed.write_bytes(sealed.read_bytes()[:-length])
    with pytest.raises(manifest.Damaged, match="is damaged"):
        manifest.check(sealed)


@pytest.mark.parametrize("stray", [".nfs0000000000a1b2c3", ".DS_Store", "note.txt", "inner/._x"])
def test_stray_file_in_a_folder_is_ignored(folder: Path, stray: str) -> None:
    (folder / stray).write_text("")
    assert manifest.check(folder)


def test_stray_link_in_a_folder_is_ignored(folder: Path) -> None:
    (folder / "current").symlink_to("/etc/hostname")
    assert manifest.check(folder)


def test_stray_file_that_is_there_at_the_sealing_may_go(folder: Path) -> None:
    for stray in (".nfs0000000000a1b2c3", ".DS_Store"):
        (folder / stray).write_text("")
    manifest.seal_folder(folder)
    for stray in (".nfs0000000000a1b2c3", ".DS_Store"):
        (folder / stray).unlink()
    assert manifest.check(folder)


@pytest.mark.parametrize("name", ["meta.pt", "inner/__0_0.distcp"])
def test_folder_that_lacks_a_file_of_its_manifest_is_damaged(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(manifest.Damaged, match=re.escape(f"{name} is missing")):
        manifest.check(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", ""])
def test_manifest_that_names_a_file_outside_its_folder_is_damaged(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("x")
    (folder / manifest.MANIFEST).write_text(manifest._canonical({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(manifest.Damaged, match="was changed"):
        manifest.check(folder)


def test_file_below_a_linked_folder_is_refused(folder: Path) -> None:
    (folder / "inner").rename(folder.parent / "elsewhere")
    (folder / "inner").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(manifest.Damaged, match="is a link"):
        manifest.check(folder)


def test_folder_with_a_link_is_no_checkpoint(folder: Path) -> None:
    (folder / "meta.pt").unlink()
    (folder / "meta.pt").symlink_to("/etc/hostname")
    with pytest.raises(manifest.Damaged, match="is a link"):
        manifest.check(folder)


def test_verdict_is_remembered_until_the_file_changes(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert manifest.check(sealed)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_sha256", lambda *_: pytest.fail("read again"))
        assert manifest.check(sealed)
    sealed.write_bytes(sealed.read_bytes()[:-1] + b"0")
    with pytest.raises(manifest.Damaged):
        manifest.check(sealed)


def test_damaged_file_is_refused_before_it_is_unpickled(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(sealed, 8 * 500)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"is damaged.*last\.previous\.ckpt"):
        read_file(sealed)


@pytest.mark.parametrize("address", ["http://host/x.ckpt", "https://host/x.ckpt", "s3://b/x.ckpt", "file:///x.ckpt"])
def test_address_is_no_checkpoint(address: str) -> None:
    with pytest.raises(ConfigError, match="is a URL"):
        read_file(address)


def test_only_a_zip_without_a_comment_is_sealed(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        sealing = manifest.Sealing(file)
        sealing.write(b"no zip")
        with pytest.raises(ValueError, match="only a zip"):
            sealing.seal()


def test_damaged_folder_is_refused_before_its_index_is_unpickled(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"no pickle")
    manifest.seal_folder(folder)
    flip(folder / ".metadata", 3)
    with pytest.raises(ConfigError, match="is damaged"):
        read_checkpoint(folder)
