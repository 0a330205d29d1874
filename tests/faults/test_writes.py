"""Nothing that was written before is lost, whenever a command is killed or the disk is full, of any file it writes."""

from __future__ import annotations

import csv
import json
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import writes
from sweep_folder import ablation
from warm import Warm

from blockwright.blocks.checkpoint import manifest

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENISE, TRAIN = "blockwright.training.data.mixture.tokenise", "blockwright.train"
SWEEP = "blockwright.lab.sweep"
BEGUN = {
    "*/events.out.tfevents.*": "TensorBoard's, which are appended to and read up to where they are cut",
    "*/tensorboard/hparams.yaml": "Lightning's, which nothing reads",
    "*/multirun.yaml": "Hydra's, which a multirun begins with, and nothing needs to resume",
}
FAULTS = {"run": 9, "tokenise": 1, "megatron": 1, "report": 9, "sweep": 29, "search": 37}  # every so many writes
FULL = ("run", "tokenise", "report")  # those that a full disk is tried with
IN_C = ("/study.db",)  # SQLite's, which keeps a journal


@dataclass(frozen=True)
class Work:
    """A command that writes, and how it is repeated after a kill.

    Args:
        first: Python's arguments, in a folder
        then: those that resume it; None for the same
        prepare: makes what it reads in the folder
    """

    first: list[str]
    then: list[str] | None = None
    prepare: Callable[[], object] = lambda: None


@pytest.fixture
def tiny_run(tmp_path: Path, corpus_file: Path) -> list[str]:
    """Overrides of a run of two steps with a validation after each: its figures come later than those of training."""
    return [
        *("model.n_layers=1", "model.d_model=32", "model.max_positions=64", "data=text", "data.sequence_length=32"),
        *(f"data.corpus.files={corpus_file}", "data.batch_size=2", "data.eval_batch_size=8", "data.eval_windows=4"),
        *(f"paths.data_dir={tmp_path}/x/data", f"paths.log_dir={tmp_path}/x/logs", "trainer.max_steps=2"),
        *("trainer.val_check_interval=1", "trainer.log_every_n_steps=1", "callbacks.report.sample_tokens=4"),
        "test=false",
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
        "report": Work(["-m", "blockwright", "report", f"{folder}/arms"], prepare=lambda: ablation(folder / "arms")),
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


QUICK = ("tokenise", "report")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
def test_every_file_is_replaced_as_a_whole_or_appended_to(name, works, watched, tmp_path):
    work, seen = works[name], []
    work.prepare()
    prepared = writes.contents(tmp_path / "x").keys()
    for i, arguments in enumerate((work.first, work.then or work.first)):  # over what is there already
        known = [path.stat().st_ino for path in (tmp_path / "x").rglob("*")]
        done = watched(arguments, log=f"{tmp_path}/{i}.log")
        assert done.returncode == 0, done.stdout + done.stderr
        noted = writes.read(tmp_path / f"{i}.log")
        assert not writes.unsafe(noted, BEGUN, known)
        seen += noted
        unseen = set(writes.unseen(seen, tmp_path / "x")) - prepared
        assert not [each for each in unseen if not each.endswith(IN_C)]


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
    """What runs and shards have come to; of figures, those that a run ended after its last step still measures.

    The last step is saved before its row is logged: a run that is ended between has no row of it.
    """
    figures, steps = {}, {}
    for file in folder.rglob("results.json"):
        metrics = json.loads(file.read_text()).get("metrics", {})
        figures[str(file)] = {name: value for name, value in metrics.items() if name.startswith("val/")}
    for file in folder.rglob("metrics.csv"):
        steps[str(file)] = {row["step"] for row in csv.DictReader(file.open()) if row["train/loss"]} - {"1"}
    return {**figures, **steps, **{str(file): file.read_bytes() for file in folder.rglob("0*.bin")}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault"),
    [*((name, "kill") for name in FAULTS), *((name, "full") for name in ("run", "tokenise", "report"))],
)
def test_a_command_that_is_ended_at_any_write_continues(name, fault, works, watched, tmp_path):
    work, folder, before = works[name], tmp_path / "x", tmp_path / "before"
    quiet = ["logger=csv"] if name in ("run", "sweep", "search") else []
    work.prepare()
    assert watched([*work.first, *quiet]).returncode == 0
    undisturbed = results(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    work.prepare()
    for at in range(0, 10_000, FAULTS[name]):
        begun = work.then and (folder / "sweep" / "plan.json").exists()
        before.unlink(missing_ok=True)
        arguments = work.then if begun else [*work.first, *quiet]
        done = watched(arguments, at=at, fault=fault, before=str(before))
        if fault == "kill":
            whole(folder)
        elif before.exists():
            held, left = pickle.loads(before.read_bytes()), writes.contents(folder)
            lost = [path for path in held if not left.get(path, b"").startswith(held[path])]
            moved = [path for path in lost if left.get(path) in held.values()]  # what was complete took its place
            assert [path for path in lost if not writes.TEMPORARY.fullmatch(path)] == moved, (at, done.stderr)
            assert "Traceback" not in done.stderr, (at, done.stderr)
        if done.returncode == 0:
            break
    assert results(folder) == undisturbed


WRITES = re.compile(
    r"""\.open\(\s*["'][wxr+]*[wx+]|\bopen\([^()]*,\s*["'][rb]*[wx+]|\.write_(?:text|bytes)\(|\.tofile\(|\.savefig\("""
    r"""|OmegaConf\.save\(|torch\.save\(|np\.savez?\(|save_file\(|shutil\.copy\w*\(|O_WRONLY|O_TRUNC"""
)
DOORS = r"(?:replaced|whole|claimed|refused_if_unwritable)\("
ELSEWHERE = {
    "blocks/checkpoint/manifest.py": "into a folder that is renamed afterwards",
    "blocks/checkpoint/shards.py": "into a folder that `whole` renames",
    "blocks/conformance/construction.py": "into memory",
    "lab/calibration/runs.py": "to /dev/null",
    "lab/chat/talk.py": "a new file; an old one is refused",
    "lab/sweep/job.py": "a file that is deleted: whether a folder can hold checkpoints",
    "packages/asap/src/blockwright_asap/study.py": "a lock",
    "plugins/alignment/sandbox/box.py": "to /dev/null",
    "plugins/kubernetes/pod.py": "Kubernetes' message of a pod, which is no file to be replaced",
    "plugins/hub/exporting.py": "into a folder that `whole` renames",
    "plugins/hub/gguf.py": "into a folder that `whole` renames",
    "plugins/serve/files.py": "into a temporary folder",
    "registry/command.py": "to /dev/null",
    "registry/printing.py": "to /dev/null",
    "training/checkpoints/atomic.py": "to a temporary path, which its caller renames",
    "training/checkpoints/saving.py": "to a temporary path, which its caller renames",
    "training/data/packing.py": "into a folder that is renamed afterwards",
    "training/data/tokenizers/companions.py": "into a folder that `whole` renames",
    "training/data/tokenizers/files.py": "into a folder that `whole` renames",
    "training/parallel/strategy.py": "into a folder that is renamed afterwards",
}


def test_no_other_source_writes_a_file_under_its_own_name() -> None:
    found = set()
    for folder in ("blocks", "lab", "packages", "plugins", "registry", "training"):
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            if "/tests/" not in name and WRITES.search(text := file.read_text()):
                functions = re.split(r"\n(?=(?: {4})?(?:async )?def |class )", text)
                found |= {name for each in functions if WRITES.search(each) and not re.search(DOORS, each)}
    assert found == set(ELSEWHERE)
