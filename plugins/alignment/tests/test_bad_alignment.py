"""Bad inputs to alignment, through the command: each ends in one message with exit code 64.

Rules of records, templates and settings are tested where they live; here is one row of each way to the command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.data.conversations import Conversations
from blockwright.training.entry.main import main

pytestmark = pytest.mark.xdist_group("bad_alignment")

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
ASKED = {"prompt": "Hi", "completion": "?", "answer": "Yes"}
GRPO = ["data=prompts", "task=grpo"]
CASES: dict[str, tuple[Any, list[str], str]] = {  # a record; overrides; the path
    "no start": (PAIR, ["data=preferences", "task=preference"], "init_from"),
    "nothing to answer": ({"messages": [ANSWER]}, [*GRPO, "START"], "data.corpus.files"),
    "other tokens than the start": (
        ASKED,
        [*GRPO, "START", "data/tokenizer=chars", "data.tokenizer.vocab_size=257"],
        "data.tokenizer",
    ),
}


@pytest.fixture(scope="module")
def start(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of bytes."""
    decoder = compose(tiny(vocab_size=257), seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    file = tmp_path_factory.mktemp("start") / "start.ckpt"
    data = {"tokenizer": {"kind": "bytes", "vocab_size": 257}}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}, "Data": data}, file)
    return file


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_message(
    name: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, overrides, path = CASES[name]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([json.dumps(record)] * 12))
    given = [
        part
        for word in overrides
        for part in (["model=pretrained", f"init_from={start}"] if word == "START" else [word])
    ]
    given += [
        "data.sequence_length=16",
        "data.batch_size=2",
        "data.corpus.val_fraction=0",
        "data.corpus.test_fraction=0",
    ]
    given += ["trainer.max_steps=1", "logger=none", "callbacks=none", "test=false", f"data.corpus.files={file}"]
    given += [f"paths.root_dir={tmp_path}", f"paths.data_dir={tmp_path / 'cache'}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 64, said
    messages = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and messages[0].startswith(f"error: {path}"), said
    assert "remedy:" in said and "Traceback" not in said and not list(tmp_path.rglob("*.ckpt")), said


@pytest.mark.parametrize(
    "text", ['{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "[" * 100_000, "{oops"]
)
def test_line_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        corpus = Conversations(str(file), val_fraction=0, test_fraction=0)
        corpus.check()
        list(corpus.documents("train"))
    assert refusal.value.path == "data.corpus.files"
