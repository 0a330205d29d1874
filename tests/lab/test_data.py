"""``blockwright data``: the table of a mixture, samples of it, and what the run would refuse."""

import re

import pytest

from blockwright.lab.data import main
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents


@pytest.fixture
def arguments(tmp_path):
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


def test_a_text_has_a_row_for_each_split(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question.\n" * 200)
    own = ["data=text", f"data.corpus.files={tmp_path}/a.txt", "data/tokenizer=bytes", "data.sequence_length=16"]
    assert main([*own, "trainer.max_steps=10", f"paths.data_dir={tmp_path}/data", "--samples", "3"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["train", "val", "test"] and "epochs" in head
    assert lines[3].startswith("train: 'to be or not")


def test_tokens_of_conversations_are_shown_without_the_marks_that_lie_beside_them_on_disk(tmp_path, capsys):
    own = ["data=sorting", f"paths.data_dir={tmp_path}/data", "data.corpus.train=200", "data.corpus.held_out=20"]
    assert main([*own, "trainer.max_steps=10", "--samples", "3"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for line in lines[:3]:  # a digit or = is one byte; the two ends, of the answer and of the conversation, are none
        n_tokens, n_documents, a_token = (float(each.replace(",", "")) for each in line.split()[1:4])
        assert a_token == pytest.approx(1 - 2 * n_documents / n_tokens, abs=0.006)
    asked, said = re.findall(r"(\d+)=(\d+)", lines[3])[0]
    assert sorted(asked) == sorted(said[: len(asked)])


def test_what_the_run_would_refuse_is_refused_after_the_table(arguments, capsys):
    assert main([*arguments, "trainer.max_steps=4000"]) == 64
    printed = capsys.readouterr()
    assert "error: data.most_epochs = 4" in printed.err and printed.out.startswith("source")


WEB = "web: {files: TMP/web.npy}"
# What is changed → the path of the message. TMP is the folder of the files.
BAD = {
    "data.sources={web: {files: TMP/wob.npy}}": "data.sources.web.files",
    "data.sources={WEB, again: {files: TMP/web.npy}}": "data.sources.web.files",
    "data.sources={WEB, pickled: {files: TMP/meta.pkl}}": "data.sources.pickled.files",
    "data.sources={WEB, other: {corpus: {_target_: pathlib.Path}}}": "data.sources.other.corpus",
    "data.stages=[{shares: {web: 0.7, cod: 0.3}}]": "data.stages.0.shares.cod",
    "data.most_epochs={cod: 3}": "data.most_epochs.cod",
    "data.sharez=3": "data.sharez",
    "--smaples=3": "command line",
    "data=copying": "data",
}


@pytest.mark.parametrize("change", BAD)
def test_it_is_one_message_and_nothing_is_written(arguments, tmp_path, capsys, change):
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04N.")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    replaced = ("data.stages", "data.sources") if change.startswith("data.sources") else ("data.stages",)
    given = [] if change == "data=copying" else [each for each in arguments if not each.startswith(replaced)]
    assert main([*given, change.replace("WEB", WEB).replace("TMP", str(tmp_path))]) == 64
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and f"error: {BAD[change]} = " in message and "remedy: " in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
