"""A run trained once more: its overrides with a change, what differs, and what is refused unless it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from warm import Warm

from blockwright.lab import again
from blockwright.registry import user_conf
from blockwright.training.configuration import parts, placeholders
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.parse import parse_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run on a text: what it was given, what that made, and the state of its data."""
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    overrides = [
        "data=text", f"data.corpus.files={tmp_path}/a.txt", "data/tokenizer=bytes", "data.sequence_length=16",
        "data.batch_size=2", f"data.cache_dir={tmp_path}/cache", "optimizer.lr=0.02", "ckpt_path=last",
    ]  # fmt: skip
    composed = compose_config(overrides, output_dir=placeholders.ANY)
    (folder := tmp_path / "run").joinpath(".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(composed, folder / ".hydra" / "config.yaml")
    data = parts.build("data", parse_settings(composed))
    data.prepare_data()
    data.setup(None)
    (folder / "checkpoints").mkdir()
    found = {"state_dict": {}, "hyper_parameters": {"model": {}}, "data": data.state_dict()}
    torch.save(found, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def planned(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The exit code and what is said of ``again RUN …``, which trains nothing."""

    def plan(*words: str) -> tuple[int, str]:
        code = again.main([str(run), *words, "--plan-only"])
        out, err = capsys.readouterr()
        return code, out + err

    return plan


def command(said: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if line.startswith("blockwright train ")]
    return line.split()[2:]


def test_overrides_of_the_run_and_ones_own_make_the_command(planned: Callable[..., tuple[int, str]]) -> None:
    code, said = planned()
    assert code == 0 and "optimizer.lr=0.02" in command(said) and "ckpt_path=last" not in command(said)
    assert "differs" in said and "same order" in said
    code, said = planned("optimizer.lr=0.05", "model/attention=gqa")
    assert code == 0 and command(said)[-2:] == ["optimizer.lr=0.05", "model/attention=gqa"]
    assert "optimizer.lr=0.02" not in command(said) and "model.attention.name" in said and "same order" in said
    code, said = planned("seed=5", "--without", "optimizer.lr")
    assert code == 0 and "optimizer.lr" not in " ".join(command(said)) and "same order" not in said


def test_what_was_not_asked_for_is_refused_until_it_is_settled(
    run: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    file = run / ".hydra" / "config.yaml"
    then = OmegaConf.load(file)
    then.optimizer.weight_decay = 0.5  # a default that has changed since
    then.optimizer.eps = 0.1
    then.trainer.enable_progress_bar = "no figure depends on it"
    OmegaConf.save(then, file)
    code, said = planned("seed=5")
    assert code == 64 and "optimizer.weight_decay" in said and "0.5" in said
    assert "likewise optimizer.eps" in said
    assert planned("seed=5", "optimizer.weight_decay=0.5")[0] == 64
    for settled in (0.5, 0.1):
        assert planned("seed=5", f"optimizer.weight_decay={settled}", "optimizer.eps=1e-8")[0] == 0


def test_a_folder_that_the_run_was_composed_with_is_asked_for(
    run: Path, planned: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine := run.parent / "mine" / "experiment").mkdir(parents=True)
    (mine / "own.yaml").write_text("# @package _global_\nseed: 3\n")
    sources = [{"path": str(mine.parent), "provider": user_conf.PROVIDER}]
    OmegaConf.save({"hydra": {"runtime": {"config_sources": sources}}}, run / ".hydra" / "hydra.yaml")
    code, said = planned()
    assert code == 64 and said.startswith(f"error: --config-dir = {mine.parent}\n")
    monkeypatch.setenv(user_conf.VARIABLE, str(mine.parent))
    assert planned()[0] == 0


def test_a_run_without_a_checkpoint_says_what_is_not_known(run: Path, planned: Callable[..., tuple[int, str]]) -> None:
    (run / "checkpoints" / "last.ckpt").unlink()
    code, said = planned()
    assert code == 0 and "same order, if" in said


def test_another_text_is_refused(run: Path, planned: Callable[..., tuple[int, str]]) -> None:
    (run.parent / "a.txt").write_text("Whether 'tis nobler in the mind to suffer\n" * 400)
    code, said = planned("optimizer.lr=0.05")
    assert code == 64 and "corpus" in said
    code, said = planned("data.batch_size=4")  # asked for, so other batches are what is wanted
    assert code == 0 and "same order" not in said


@pytest.mark.parametrize(
    ("spoil", "words", "path"),
    [
        (lambda run: (run / "plan.json").write_text("{}"), [], "RUN"),
        (lambda run: (run / ".hydra" / "overrides.yaml").unlink(), [], "RUN"),
        (lambda run: (run / ".hydra" / "overrides.yaml").write_text("{a: 1}"), [], "overrides.yaml"),
        (lambda run: (run / ".hydra" / "config.yaml").write_text("[1]"), [], "RUN"),
        (lambda run: None, ["--without", "seed"], "--without"),
        (lambda run: None, ["model/attention=gqaa"], "model/attention"),
    ],
    ids=["a sweep", "no overrides", "no list", "no mapping", "not an override", "no option"],
)
def test_refused(
    run: Path, planned: Callable[..., tuple[int, str]], spoil: Callable[[Path], Any], words: list[str], path: str
) -> None:
    spoil(run)
    code, said = planned(*words)
    assert code == 64 and path in said.splitlines()[0]


@pytest.mark.slow
def test_unchanged_it_is_the_same_run_in_another_folder(
    small: list[str], warm: Warm, environment: Any, tmp_path: Path
) -> None:
    def figures(*words: str) -> tuple[Path, dict[str, float]]:
        done = warm.run("-m", "blockwright", *words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder,) = {file.parent for file in (tmp_path / "logs").rglob("results.json")} - known
        known.add(folder)
        measured = json.loads((folder / "results.json").read_text())["metrics"]
        return folder, {key: value for key, value in measured.items() if "loss" in key}

    known: set[Path] = set()
    first, theirs = figures("train", *small)
    _, same = figures("again", str(first))
    _, other = figures("again", str(first), "seed=9")
    assert theirs == same != other
