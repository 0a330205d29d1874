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
from blockwright.training.entry.main import main

ANSWER = {"role": "assistant", "content": "Hello"}
PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
ASKED = {"prompt": "Hi", "completion": "?", "answer": "Yes"}
GRPO, CHARS = ["data=prompts", "task=grpo"], ["data/tokenizer=chars", "data.tokenizer.vocab_size=257"]
CASES: dict[str, tuple[Any, list[str], str]] = {  # a record; overrides; the path
    "no start": (PAIR, ["data=preferences", "task=preference"], "init_from"),
    "nothing to answer": ({"messages": [ANSWER]}, [*GRPO, "START"], "data.corpus.files"),
    "other tokens than the start": (ASKED, [*GRPO, "START", *CHARS], "data.tokenizer"),
}


def test_bad_input_ends_in_one_message(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    decoder = compose(tiny(vocab_size=257), seed=7)
    start = {"state_dict": {f"decoder.{k}": v for k, v in decoder.state_dict().items()}}
    start |= {
        "hyper_parameters": {"model": decoder.config},
        "Data": {"tokenizer": {"kind": "bytes", "vocab_size": 257}},
    }
    torch.save(start, tmp_path / "start.pt")
    small = ["data.sequence_length=16", "data.batch_size=2", "data.corpus.val_fraction=0"]
    small += [
        "data.corpus.test_fraction=0",
        "trainer.max_steps=1",
        "logger=none",
        "callbacks=none",
        "test=false",
        f"paths.root_dir={tmp_path}",
    ]
    monkeypatch.chdir(tmp_path)
    for name, (record, overrides, path) in CASES.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join([json.dumps(record)] * 12))
        given = [*overrides, *small, f"data.corpus.files='{file}'", f"paths.data_dir={tmp_path / 'cache'}"]
        if "START" in given:
            given.remove("START")
            given += ["model=pretrained", f"init_from={tmp_path / 'start.pt'}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *given])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 64, said
        messages = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1 and messages[0].startswith(f"error: {path}"), said
        assert "remedy:" in said and "Traceback" not in said and not list(tmp_path.rglob("*.ckpt")), said
