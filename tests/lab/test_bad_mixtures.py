"""Ways to name data wrongly: each is one message with path and remedy, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockwright.lab.data import main
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents

LETTERS = {"web": b"abcdefgh .\n", "code": b"0123456789 ="}
SOURCES = "{web: {files: TMP/web.npy, val_tokens: 300}, code: {files: TMP/code.npy}}"
WEB = "web: {files: TMP/web.npy}"

# What is changed → the path of the message. TMP is the folder of the files, of which ``bad`` writes the broken ones.
BAD: dict[str, str] = {
    "data.sources={web: {files: TMP/wob.npy}}": "data.sources.web.files",
    "data.sources={WEB, again: {files: TMP/web.npy}}": "data.sources.web.files",
    "data.sources={WEB, pickled: {files: TMP/meta.pkl}}": "data.sources.pickled.files",
    "data.sources={WEB, other: {corpus: {_target_: pathlib.Path}}}": "data.sources.other.corpus",
    "data.stages=[{shares: {web: 0.7, cod: 0.3}}]": "data.stages.0.shares.cod",
    "data.most_epochs={cod: 3}": "data.most_epochs.cod",
    "trainer.max_steps=100000": "data.most_epochs",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (name, letters) in enumerate(LETTERS.items()):
        formats.npy(tmp_path / f"{name}.npy", documents(90, i, letters))
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04N.")
    return tmp_path


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", BAD)
def test_it_is_one_message_and_nothing_is_written(folder, capsys, change):
    before = contents(folder)
    sources = [] if change.startswith("data.sources") else [f"data.sources={SOURCES}"]
    usual = ["data=mixture", "data/tokenizer=bytes", "data.sequence_length=16", "trainer.max_steps=10"]
    given = [each.replace("WEB", WEB).replace("TMP", str(folder)) for each in (*sources, change)]
    assert main([*usual, f"paths.data_dir={folder}/data", *given]) == 64
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and f"error: {BAD[change]} = " in message and "remedy: " in message
    assert contents(folder) == before
