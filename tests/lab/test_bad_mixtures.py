"""Thirty ways to name data wrongly: each is one message with path and remedy, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockwright.lab.data import main
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents, flat

LETTERS = {"web": b"abcdefgh .\n", "code": b"0123456789 ="}
SOURCES = "{web: {files: TMP/web.npy, val_tokens: 300}, code: {files: TMP/code.npy}}"
WEB = "web: {files: TMP/web.npy}"

# What is changed → the path of the message. TMP is the folder of the files, of which ``bad`` writes the broken ones.
BAD: dict[str, str] = {
    "data.sources={}": "data.sources",
    "data.sources={a/b: {files: TMP/web.npy}}": "data.sources",
    "data.sources={web: {files: TMP/wob.npy}}": "data.sources.web.files",
    "data.sources={web: {files: TMP}}": "data.sources.web.files",
    "data.sources={web: {files: []}}": "data.sources.web.files",
    "data.sources={web: {files: /**/*.npy}}": "data.sources.web.files",
    "data.sources={web: {file: TMP/web.npy}}": "data.sources.web.file",
    "data.sources={web: {files: TMP/web.npy, dtype: uint8}}": "data.sources.web.dtype",
    "data.sources={web: {files: TMP/web.npy, documents: lines}}": "data.sources.web.documents",
    "data.sources={web: {files: TMP/web.npy, val_tokens: 9000000}}": "data.sources.web.val_tokens",
    "data.sources={web: {files: TMP/web.npy, val: TMP/web.npy}}": "data.sources.web.val",
    "data.sources={WEB, again: {files: TMP/web.npy}}": "data.sources.web.files",
    "data.sources={WEB, raw: {files: TMP/raw.bin}}": "data.sources.raw.files",
    "data.sources={WEB, raw: {files: TMP/odd.bin, dtype: uint16}}": "data.sources.raw.files",
    "data.sources={WEB, text: {files: TMP/a.jsonl}}": "data.sources.text.files",
    "data.sources={WEB, pickled: {files: TMP/meta.pkl}}": "data.sources.pickled.files",
    "data.sources={WEB, short: {files: TMP/truncated.npy}}": "data.sources.short.files",
    "data.sources={WEB, other: {files: TMP/far.npy}}": "data.sources.other.files",
    "data.sources={WEB, other: {files: TMP/other.npy}}": "data.sources.other.files",
    "data.sources={WEB, other: {corpus: {_target_: pathlib.Path}}}": "data.sources.other.corpus",
    "data.stages=[]": "data.stages",
    "data.stages=[{shares: {web: 0.7, code: 0.7}}]": "data.stages.0.shares",
    "data.stages=[{shares: {web: 0.7, cod: 0.3}}]": "data.stages.0.shares.cod",
    "data.stages=[{shares: {web: 1}}]": "data.sources.code",
    "data.stages=[{shares: {web: 1.5, code: -0.5}}]": "data.stages.0.shares.web",
    "data.stages=[{shares: {web: 0.5, code: 0.5}, batches: 3}]": "data.stages.0.batches",
    "data.stages=[{share: {web: 0.5, code: 0.5}}]": "data.stages.0",
    "data.stages=[{shares: {web: 0.5, code: 0.5}, batches: 90}, {shares: {web: 1}}]": "data.stages.1",
    "data.most_epochs=0": "data.most_epochs",
    "data.most_epochs={cod: 3}": "data.most_epochs.cod",
    "data.val_shares={code: 1}": "data.val_shares.code",
    "data.val_shares=size": "data.val_shares",
    "data.digests=some": "data.digests",
    "data.stands_for=100": "data.stands_for",
    "data.sequence_length=100000": "data.sequence_length",
    "trainer.max_steps=100000": "data.most_epochs",
    "trainer.max_steps=-1": "trainer.max_steps",
    "data/tokenizer=chars": "data.tokenizer",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (name, letters) in enumerate(LETTERS.items()):
        formats.npy(tmp_path / f"{name}.npy", documents(90, i, letters))
    ids = np.array(flat(documents(60, 3)))
    formats.raw(tmp_path / "raw.bin", documents(9))
    (tmp_path / "odd.bin").write_bytes(b"odd")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04N.")
    (tmp_path / "truncated.npy").write_bytes((tmp_path / "web.npy").read_bytes()[:-9])
    np.save(tmp_path / "far.npy", np.where(ids == formats.EOS, ids, ids + 40_000))
    formats.npy(tmp_path / "other.npy", documents(60, 4, bytes(range(128, 256))))
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
