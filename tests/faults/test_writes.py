"""Nothing that was written before is lost, whenever a command is killed or the disk is full, of any file it writes."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import writes
from warm import Warm

from blockwright.blocks.checkpoint import manifest

TOKENISE, TRAIN, REPORT = "blockwright.training.data.mixture.tokenise", "blockwright.train", "blockwright.lab.report"
SWEEP = "blockwright.lab.sweep"
BEGUN = {
    "*/events.out.tfevents.*": "TensorBoard's, which are appended to and read up to where they are cut",
    "*/tensorboard/hparams.yaml": "Lightning's, which nothing reads",
    "*/multirun.yaml": "Hydra's, which a multirun begins with, and nothing needs to resume",
}
IN_C = ("/study.db",)  # SQLite's, which keeps a journal


@dataclass(frozen=True)
class Work:
    """A command that writes, and how it is repeated after a kill.

    Args:
        first: Python's arguments, in a folder
        then: those that resume it; None for the same
    """

    first: list[str]
    then: list[str] | None = None


@pytest.fixture
def tiny_run(tmp_path: Path, corpus_file: Path) -> list[str]:
    """Overrides of a run of four steps and two validations, in which a figure appears late."""
    return [
        *("model.n_layers=1", "model.d_model=32", "model.max_positions=64", "data=text", "data.sequence_length=32"),
        *(f"data.corpus.files={corpus_file}", "data.batch_size=2", "data.eval_batch_size=8", "data.eval_windows=4"),
        *(f"paths.data_dir={tmp_path}/x/data", f"paths.log_dir={tmp_path}/x/logs", "trainer.max_steps=4"),
        *("trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "callbacks.report.sample_tokens=4"),
        *("extras.print_config=false", "test=false"),
    ]


@pytest.fixture
def works(tmp_path: Path, tiny_run: list[str]) -> dict[str, Work]:
    """Every command of this page by its name, in the folder x of the test's."""
    texts, folder = tmp_path / "texts", tmp_path / "x"
    texts.mkdir()
    for i in range(2):
        rows = (json.dumps({"text": f"document {i} {k}"}) for k in range(20))
        (texts / f"{i}.jsonl").write_text("\n".join(rows) + "\n")
    tokenise = ["-m", TOKENISE, f"{texts}/*.jsonl", f"{folder}/shards", "--tokenizer=bytes", "--processes=1"]
    run, sweep = ["-m", TRAIN, *tiny_run], ["-m", TRAIN, "-m", *tiny_run, f"hydra.sweep.dir={folder}/sweep"]
    resumed = ["-m", SWEEP, "resume", f"{folder}/sweep"]
    search = ["hparams_search=optuna", "hydra.sweeper.n_trials=2", "optimizer.lr=interval(1e-3,1e-2)"]
    return {
        "run": Work([*run, f"hydra.run.dir={folder}/run", "auto_resume=true"]),
        "tokenise": Work(tokenise),
        "megatron": Work([*tokenise, "--format=megatron"]),
        "sweep": Work([*sweep, "seed=1,2"], resumed),
        "search": Work([*sweep, *search], resumed),
    }


@pytest.fixture
def watched(warm: Warm, environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command, watched in the folder x of the test's."""
    (tmp_path / "x").mkdir()

    def run(arguments: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        given = {"arguments": arguments, "folder": f"{tmp_path}/x", **given}
        program = writes.WATCHED.format(path=[str(Path(__file__).parent)], given=given)
        return warm.run("-c", program, cwd=tmp_path, env=environment)

    return run


@pytest.mark.parametrize("name", ["run", "tokenise", "megatron", "sweep", "search"])
def test_every_file_is_replaced_as_a_whole_or_appended_to(
    name: str, works: dict[str, Work], watched: Callable[..., Any], tmp_path: Path
) -> None:
    """The second time, what the first has written is there already."""
    work, seen = works[name], []
    for i, arguments in enumerate((work.first, work.then or work.first)):
        known = [path.stat().st_ino for path in (tmp_path / "x").rglob("*")]
        done = watched(arguments, log=f"{tmp_path}/{i}.log")
        assert done.returncode == 0, done.stdout + done.stderr
        noted = writes.read(tmp_path / f"{i}.log")
        assert not writes.unsafe(noted, BEGUN, known)
        seen += noted
        assert not [each for each in writes.unseen(seen, tmp_path / "x") if not each.endswith(IN_C)]


def whole(folder: Path) -> None:
    """Every file that has its own name can be read to its end."""
    for name, content in writes.contents(folder).items():
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith((".csv", ".jsonl", ".yaml")) and content:
            assert content.endswith(b"\n"), name
        elif name.endswith(".svg"):
            assert content.rstrip().endswith(b"</svg>"), name
        elif name.endswith(".ckpt"):
            assert manifest.check(folder / name), name


def results(folder: Path) -> dict[str, Any]:
    """What runs and shards have come to, without times."""
    runs = {file: json.loads(file.read_text())["metrics"] for file in sorted(folder.rglob("results.json"))}
    figures = {str(file): {k: v for k, v in each.items() if not k.startswith("speed/")} for file, each in runs.items()}
    steps = {str(file): [row["step"] for row in csv.DictReader(file.open())] for file in sorted(folder.rglob("*.csv"))}
    return {**figures, **steps, **{str(file): file.read_bytes() for file in sorted(folder.rglob("0*.bin"))}}


FAULTS = {"run": 7, "tokenise": 1, "megatron": 1, "sweep": 19, "search": 29}  # every so many writes


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "full"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_command_that_is_ended_at_any_write_continues(
    name: str, fault: str, works: dict[str, Work], watched: Callable[..., Any], tmp_path: Path
) -> None:
    """Each time it is ended a write later than the time before, and it ends as one that nothing has disturbed."""
    work, folder, before = works[name], tmp_path / "x", tmp_path / "before"
    quiet = ["logger=csv"] if name in ("run", "sweep", "search") else []
    assert watched([*work.first, *quiet]).returncode == 0
    undisturbed = results(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    for at in range(0, 10_000, FAULTS[name]):
        begun = work.then and (folder / "sweep" / "plan.json").exists()
        before.unlink(missing_ok=True)
        arguments = work.then if begun else [*work.first, *quiet]
        done = watched(arguments, at=at, fault=fault, before=str(before))
        if fault == "kill":
            whole(folder)
        elif before.exists():
            held, left = pickle.loads(before.read_bytes()), writes.contents(folder)
            lost = [path for path, content in held.items() if not left.get(path, b"").startswith(content)]
            moved = [path for path in lost if left.get(path) in held.values()]  # as a checkpoint is to the previous one
            assert lost == moved, (at, lost, done.stderr)
            assert "Traceback" not in done.stderr, (at, done.stderr)
        if done.returncode == 0:
            break
    assert results(folder) == undisturbed
