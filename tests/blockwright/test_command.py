"""``blockwright COMMAND``: each command reaches its module; what is no command is refused with a remedy."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockwright.command import COMMANDS, TRAIN, completion, run, usage
from blockwright.registry import ConfigError


def test_every_command_has_a_main_and_a_line_of_help() -> None:
    for name, command in COMMANDS.items():
        assert f"  {name} " in usage() and command.about
        spec = importlib.util.find_spec(command.module)
        source = Path(spec.origin).read_text() if spec and spec.origin else ""
        assert "def main(" in source or "import main\n" in source, name


def test_arguments_reach_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    run(["blocks", "attention/mqa"])
    assert "attention/mqa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("descrbe", "Did you mean 'describe'?"), ("model=tiny", "blockwright train model=tiny"), ("fit", "train fit")],
)
def test_what_is_no_command_is_refused(word: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as told:
        run([word])
    assert remedy in told.value.remedy


def test_train_becomes_the_module_for_the_ranks_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockwright import train

    seen = []
    monkeypatch.setattr(train, "main", lambda: seen.append((list(sys.argv), sys.modules["__main__"].__spec__)))
    monkeypatch.setattr(sys, "argv", ["blockwright", TRAIN, "seed=1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", object(), raising=False)
    run([TRAIN, "seed=1"])
    assert seen == [([train.__file__, "seed=1"], train.__spec__)]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("de", ["describe"]),
        ("describe model=tiny model/attention=ml", ["model/attention=mla"]),
        ("train model/attention=mla model.attention.kv_l", ["model.attention.kv_lora_rank="]),
    ],
)
def test_completion_offers_commands_groups_and_keys_that_begin_so(words: str, offered: list[str]) -> None:
    bash = shutil.which("bash")
    assert bash, "bash runs the completion"
    command = Path(sys.executable).with_name("blockwright")
    asked = f"COMP_WORDS=({command} {words}); COMP_CWORD={len(words.split())}"
    script = f'{completion()}\n{asked}; _blockwright; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == offered, done.stderr
