"""The package is found, typed and refused as Blockwright's own parts are, and nothing there knows of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from blockwright_asap import command
from blockwright_asap.study import Study

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("registry", "blocks", "training", "lab", "plugins", "src", "conf", "train.py")


def test_no_file_of_the_core_mentions_it() -> None:
    found = subprocess.run(["grep", "-rilE", r"\basap\b|mujoco", *PARTS], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""


def blockwright(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "blockwright", *words], capture_output=True, text=True, cwd="/")


@pytest.mark.slow
def test_delta_trains_by_the_command_swaps_and_resumes(study: Study, tmp_path: Path) -> None:
    given = [f"data.folder='{study.folder}'", "data.iterations=2", "data.episodes=2", "data.held_out=1"]
    # The study's robots of PPO are not a setting of the data, whose folder is made beside it.
    given[0] = f"data.folder='{tmp_path / 'made'}'"
    quiet = ["logger=none", "data.history=3", "data.prompt=4", "trainer.max_steps=4"]
    quiet += ["trainer.val_check_interval=2", "data.base=sysid", f"hydra.run.dir='{tmp_path / 'run'}'"]
    done = blockwright("train", "experiment=asap_delta", "model/attention=gqa", *given, *quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "results.json").exists() and "val/replay_1s" in done.stdout
    more = [word for word in quiet if "max_steps" not in word]
    last = f"ckpt_path='{tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}'"
    done = blockwright(
        "train", "experiment=asap_delta", "model/attention=gqa", *given, *more, "trainer.max_steps=6", last
    )
    assert done.returncode == 0 and "training from step 4 of 6" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "path", "says"),
    [
        (["data.gap=bth"], "data.gap = bth", "parameters, structure, both"),
        (["data.base=sysd"], "data.base = sysd", "sim, sysid, narrow"),
        (["data.corrects=actions"], "data.corrects = actions", "action, state"),
        (["data.history=-1"], "data.history = -1", "at least 0"),
        (["data.history=100"], "data.history = 100", "Write data.history=15"),
        (["data.prompt=-1"], "data.prompt = -1", "at least 0"),
        (["data.prompt=33"], "data.prompt = 33", "Write data.prompt=32"),
        (["data.prompt=32", "data.history=68"], "data.history = 68", "0 to 67"),
        (["data.batch_size=0"], "data.batch_size = 0", "at least 1"),
        (["data.batch_size=1.5"], "data.batch_size = 1.5", "integer"),
        (["data.episodes=0"], "data.episodes = 0", "at least 1"),
        (["data.held_out=-2"], "data.held_out = -2", "at least 1"),
        (["data.robots=0"], "data.robots = 0", "at least 1"),
        (["data.iterations=none"], "data.iterations = none", "integer"),
        (["data.folder=null"], "data.folder = null", "string"),
        (["data.histroy=3"], "data.histroy", "Did you mean 'history'"),
        (["data.corrects=state", "data.drift=[logs]"], "data.drift", "data.corrects=action"),
        (["data.drift=nowhere"], "data.drift = nowhere", "list"),
        (["data.drift=[nowhere]"], "data.drift = nowhere", "experiment=asap_delta"),
        (["model.vocab_size=4"], "model.vocab_size = 4", "Set model.vocab_size=18"),
        (["model/attention=mlaa"], "model/attention = mlaa", "Did you mean 'mla'"),
        (["task=causal_lm"], "task = CausalLM", "Write task=asap_correct"),
    ],
)
def test_mistake_is_one_message(words: list[str], path: str, says: str, tmp_path: Path) -> None:
    out = [f"data.folder='{tmp_path / 'made'}'", f"hydra.run.dir='{tmp_path / 'run'}'", "logger=none"]
    out += [] if any("iterations" in w for w in words) else ["data.iterations=1"]
    done = blockwright("train", "experiment=asap_delta", "trainer.max_steps=2", *out, *words)
    assert done.returncode == 64, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert f"error: {path}" in done.stderr and says in done.stderr


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--gap", "bth"], "--gap"),
        (["--gap", "both,redrawn"], "--gap"),
        (["--methods", "sysd"], "--methods"),
        (["--seeds", "a"], "--seeds"),
        (["--seeds", "0,-1"], "--seeds"),
        (["--tune", "0"], "--tune"),
        (["--processes", "0"], "--processes"),
        (["--iterations", "0"], "--iterations"),
        (["--iterations", "many"], "--iterations"),
    ],
)
def test_mistake_of_the_command_is_one_message(
    words: list[str], path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "out"), *words])
    assert command.main() == 64
    assert f"error: {path} = " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_study_in_a_folder_of_another_is_one_message(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Study(tmp_path / "both" / "0", study.settings)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    assert command.main() == 64
    error = capsys.readouterr().err
    assert "error: data.iterations = 120" in error and "delete that one" in error
