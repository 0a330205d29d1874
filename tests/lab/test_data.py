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
