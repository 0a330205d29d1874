"""``blockwright data``: the table of a mixture, samples of it, and what the run would refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockwright.lab.data import main
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    formats.npy(tmp_path / "web.npy", documents(90, 1))
    formats.npy(tmp_path / "code.npy", documents(60, 2, b"0123456789"))
    sources = f"{{web: {{files: {tmp_path}/web.npy, val_tokens: 300}}, code: {{files: {tmp_path}/code.npy}}}}"
    stages = "[{shares: {web: 1}, batches: 4}, {shares: {web: 0.75, code: 0.25}}]"
    own = ["data=mixture", "data/tokenizer=bytes", f"data.sources={sources}", f"data.stages={stages}"]
    return [*own, "data.sequence_length=16", "trainer.max_steps=10", f"paths.data_dir={tmp_path}/data"]


def test_the_table_has_a_row_for_each_source_and_samples_follow(arguments, capsys):
    assert main([*arguments, "--samples", "5"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    columns = ["source", "tokens", "held out", "stage 1", "stage 2", "epochs", "tokenizer"]
    assert [name for name in columns if name in head] == columns
    rows = {line.split()[0]: line for line in lines[:2]}
    assert "25.0%" in rows["code"] and "100.0%" in rows["web"] and "75.0%" in rows["web"]
    assert [line.split(":")[0] for line in lines[2:]] == ["code"] * 3 + ["web"] * 2


def test_what_the_run_would_refuse_is_refused_after_the_table(arguments, capsys):
    assert main([*arguments, "trainer.max_steps=4000"]) == 64
    printed = capsys.readouterr()
    assert "error: data.most_epochs = 4" in printed.err and printed.out.startswith("source")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (["data.sources={web: {files: /nowhere/*.bin}}"], "data.sources.web.files"),
        (["data=sorting"], "data"),
        (["data.sharez=3"], "data.sharez"),
        (["--smaples=3"], "command line"),
    ],
)
def test_a_mistake_is_refused(arguments, capsys, change, path):
    if change == ["data=sorting"]:
        arguments = []
    assert main([*arguments, *change]) == 64
    message = capsys.readouterr().err
    assert f"error: {path} = " in message and "remedy: " in message


# --- what is refused --------------------------------------------------------------------------------------------------


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
