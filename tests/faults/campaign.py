"""Faults by the hundred: ``python tests/faults/campaign.py kills|disk|flips|resume|nan N`` prints what became of them.

The same functions run with small numbers in test_faults.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from tools import fill, flip, forked, killed, random_bits, small_disk  # noqa: E402

from blockwright.blocks.checkpoint import manifest  # noqa: E402
from blockwright.blocks.checkpoint.read import read_file  # noqa: E402
from blockwright.blocks.checkpoint.shards import Shards, ready, write_shards  # noqa: E402
from blockwright.registry import ConfigError  # noqa: E402
from blockwright.training.checkpoints.atomic import clean, partial_of, put_in_place, refused_if_unwritable, write_file  # noqa: E402
from blockwright.training.checkpoints.resume import newest  # noqa: E402

Figures = dict[str, Any]


def kills(folder: Path, n: int) -> Figures:
    """Kill -9 a process that does nothing but save, file or folder, ``n`` times; then start again."""
    figures = {
        "kills": 0, "saves": 0, "amid a save": 0, "damaged at a final path": 0, "left over": 0, "nothing to load": 0,
    }  # fmt: skip
    draw = random.Random(0)
    last = folder / "run" / "checkpoints" / "last.ckpt"
    for i in range(n):
        shutil.rmtree(folder / "run", ignore_errors=True)
        killed(lambda i=i: _saves(last, as_folder=i % 4 == 3), after=draw.uniform(0, 0.2), ready=last.exists)  # type: ignore[misc]
        there = list(last.parent.glob("*.ckpt")) if last.parent.exists() else []
        figures["kills"] += 1
        figures["damaged at a final path"] += sum(_is_damaged(path) for path in there)
        figures["amid a save"] += any(last.parent.glob(".*")) if last.parent.exists() else 0
        clean(folder)
        # An empty lock of a process killed before it wrote anything is removed a day later: training/claims.py.
        left = [path for path in last.parent.glob(".*") if path.suffix != ".lock"] if last.parent.exists() else []
        figures["left over"] += len(left)
        found = newest(folder)
        figures["saves"] += bool(found)
        figures["nothing to load"] += bool(there) and (found is None or not _loads(found))
    return figures


def _saves(last: Path, as_folder: bool) -> None:
    step = 0
    while True:
        step += 1
        state = {"step": step, "weights": torch.rand(300_000)}
        if not as_folder:
            write_file(state, last)
            continue
        partial = partial_of(last)
        with refused_if_unwritable(last, partial):  # claims it, as training/checkpoints/saving.py does
            partial.mkdir()
            for rank in (0, 1):
                torch.save(state, partial / f"__{rank}_0.distcp")
            manifest.seal_folder(partial)
            put_in_place(partial, last)


def _is_damaged(path: Path) -> bool:
    try:
        return not manifest.check(path)
    except manifest.Damaged:
        return True


def _loads(path: Path) -> bool:
    file = path / "__0_0.distcp" if path.is_dir() else path
    return read_file(file)["step"] > 0


def disk(folder: Path, n: int) -> Figures:
    """Save to a disk with room for a part of the file only, at ``n`` points."""
    figures = {"full disks": 0, "refused in one message": 0, "last good one intact": 0, "left over": 0}
    with small_disk(folder / "disk", 32) as mounted:
        last = mounted / "checkpoints" / "last.ckpt"
        state = {"step": 1, "weights": torch.rand(1_000_000)}
        write_file(state, last)
        size = last.stat().st_size
        for i in range(n):
            ballast = fill(mounted, leave=size * i // n)
            figures["full disks"] += 1
            try:
                write_file({**state, "step": 2}, last)
            except ConfigError as error:
                figures["refused in one message"] += "No space left" in error.rule
            figures["last good one intact"] += manifest.check(last) and read_file(last)["step"] == 1
            figures["left over"] += len(list(last.parent.glob(".*")))
            ballast.unlink()
    return figures


def flips(folder: Path, n: int) -> Figures:
    """Turn one bit of the newest checkpoint round, ``n`` times in a file and ``n`` times in a folder."""
    figures: Figures = {}
    for kind in ("file", "folder"):
        runs = folder / kind
        last = runs / "a" / "checkpoints" / "last.ckpt"
        for step in (1, 2):
            state = {"step": step, "weights": torch.rand(20_000)}
            if kind == "file":
                write_file(state, last)
                continue
            partial = partial_of(last)
            partial.mkdir(parents=True)
            for rank in (0, 1):
                torch.save(state, partial / f"__{rank}_0.distcp")
            manifest.seal_folder(partial)
            put_in_place(partial, last)
        files = [last] if kind == "file" else sorted(p for p in last.rglob("*") if p.is_file())
        found = fell_back = 0
        for i, bit in enumerate(random_bits(files[0], n) if kind == "file" else range(n)):
            file = files[i % len(files)]
            bit = bit if kind == "file" else random_bits(file, 1, seed=i)[0]
            flip(file, bit)
            found += _is_damaged(last)
            fell_back += newest(runs) == last.with_name("last.previous.ckpt")
            flip(file, bit)
        figures[kind] = {"flips": n, "noticed": found, "fell back": fell_back, "good again": not _is_damaged(last)}
    return figures


def flips_safetensors(folder: Path, n: int) -> Figures:
    """Turn one bit of exported weights round: it is noticed, or (in the header's spaces) no weight has changed."""
    tensors = {name: torch.rand(40, 50) for name in "abc"}
    write_shards(folder, {name: ready(tensor) for name, tensor in tensors.items()}, 20_000)
    files = sorted(folder.glob("*.safetensors"))
    figures = {"flips": 0, "noticed": 0, "without effect": 0, "unnoticed": 0}
    for i in range(n):
        file = files[i % len(files)]
        # Every fourth in the header, which is a small part of the file.
        bit = random_bits(file, 1, seed=i)[0] if i % 4 else random.Random(i).randrange(8 * (8 + _header_bytes(file)))
        flip(file, bit)
        figures["flips"] += 1
        try:
            shards = Shards(folder)
            found = dict(shards.read(shards.entries))
            same = found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
            figures["without effect" if same else "unnoticed"] += 1
        except ConfigError:
            figures["noticed"] += 1
        flip(file, bit)
    return figures


def _header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(8), "little")


# Whole runs. A callback writes down what each step saw, and may kill its process.

CALLBACKS = '''
import hashlib, os, signal
from pathlib import Path

import lightning as L
import torch


class Record(L.Callback):
    """Writes each step's batch and loss to a file of its rank, and kills its process at a step, in a hook."""

    observes = "writes down what it sees"

    def __init__(self, file: str, die_at: int = -1, die_in: str = ""):
        self.file, self.die_at, self.die_in = file, die_at, die_in

    def die(self, trainer, hook):
        last = trainer.global_rank == trainer.world_size - 1
        if last and hook == self.die_in and trainer.global_step >= self.die_at >= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.die(trainer, "start")

    def on_before_backward(self, trainer, task, loss):
        self.die(trainer, "backward")

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.die(trainer, "step")

    def on_save_checkpoint(self, trainer, task, checkpoint):
        self.die(trainer, "save")

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        rows = [hashlib.sha1(row.numpy().tobytes()).hexdigest()[:12] for row in batch["tokens"]]
        loss = outputs["loss"].item().hex()
        with Path(f"{self.file}.{trainer.global_rank}of{trainer.world_size}").open("a") as out:
            out.write(f"{trainer.global_step} {','.join(rows)} {loss}\\n")
        self.die(trainer, "end")


class Poison(L.Callback):
    """Makes the loss of one rank NaN at a step, or from it on."""

    def __init__(self, at: int, rank: int = 0, for_ever: bool = False):
        self.at, self.rank, self.for_ever, self.scale = at, rank, for_ever, 1.0

    def on_train_start(self, trainer, task):
        task.decoder.norm.register_forward_hook(lambda module, given, out: out * self.scale)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        now = trainer.global_step
        hit = trainer.global_rank == self.rank and (now == self.at or (self.for_ever and now > self.at))
        self.scale = float("nan") if hit else 1.0
'''


def train(folder: Path, *overrides: str) -> tuple[int, float]:
    """``train.py`` in a forked process, which finds everything imported: exit code and seconds."""
    import blockwright.training.entry.cli
    import blockwright.training.entry.execute  # noqa: F401
    import train as door

    def work() -> int:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = f"{ROOT}:{folder}"
        sys.argv = [str(ROOT / "train.py"), *_base(folder), *overrides]
        try:
            door.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    started = time.monotonic()
    return forked(work), time.monotonic() - started


def _base(folder: Path) -> list[str]:
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("".join(f"To be, or not to be: line {i} of the corpus.\n" for i in range(60)))
        (folder / "fault_callbacks.py").write_text(CALLBACKS)
    made = [
        "model.n_layers=2", "model.d_model=64", "model.max_positions=64", "data=text", f"data.corpus.files={corpus}",
    ]  # fmt: skip
    made += [
        "data.sequence_length=32",
        "data.batch_size=4",
        "data.eval_batch_size=8",
        "data.eval_windows=4",
        "test=false",
    ]
    made += ["trainer.max_steps=16", "trainer.val_check_interval=5", "trainer.log_every_n_steps=2", "logger=none"]
    made += ["callbacks.report.sample_tokens=0", f"paths.root_dir={folder}"]
    return [*made, "callbacks.interruption.every_n_steps=3"]


def _recording(file: Path, at: int = -1, hook: str = "") -> str:
    return f"+callbacks.record={{_target_: fault_callbacks.Record, file: '{file}', die_at: {at}, die_in: '{hook}'}}"


def _steps(folder: Path, name: str) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """Step → the global batches that were seen in it, and the losses; one of each where all went well."""
    rows: dict[tuple[str, int], list[tuple[int, str, str]]] = {}
    for file in folder.glob(f"{name}.*of*"):
        rank, _, world = file.suffix[1:].partition("of")
        rows[world, int(rank)] = [(int(s), b, loss) for s, b, loss in map(str.split, file.read_text().splitlines())]
    batches: dict[int, set[str]] = {}
    losses: dict[int, set[str]] = {}
    for world in {w for w, _ in rows}:
        first = {s for s, *_ in rows[world, 0]}
        for step in first:
            shares = [{b for s, b, _ in rows.get((world, r), []) if s == step} for r in range(int(world))]
            if all(len(share) == 1 for share in shares):
                batches.setdefault(step, set()).add(",".join(next(iter(share)) for share in shares))
            losses.setdefault(step, set()).update(f"{world}:{loss}" for s, _, loss in rows[world, 0] if s == step)
    return batches, losses


TWO = ("trainer=ddp_sim",)
SHARED = ("trainer=[fsdp,sim]", "trainer.strategy.sharded_checkpoints=true")


def resume(folder: Path, n: int, many: tuple[str, ...] = ()) -> Figures:
    """Kill a run -9 at random steps and hooks, resume with ``auto_resume`` and other workers; compare all steps."""
    code, _ = train(folder, *many, _recording(folder / "whole"), "task_name=whole")
    assert code == 0, (folder / "log").read_text()[-3000:]
    batches, losses = _steps(folder, "whole")
    figures = {"kills": 0, "finished": 0, "steps": 0, "same global batches": 0, "bitwise equal losses": 0}
    draw = random.Random(len(many))
    for i in range(n):
        task, hook = f"task_name=k{i}", draw.choice(["start", "backward", "step", "save", "end"])
        command = [*many, task, "auto_resume=true"]
        die = _recording(folder / f"k{i}", draw.randrange(1, 16), hook)
        code, _ = train(folder, *command, die, f"data.num_workers={2 * (i % 2)}")
        figures["kills"] += code != 0
        code, _ = train(folder, *command, _recording(folder / f"k{i}"), f"data.num_workers={2 * (i // 2 % 2)}")
        figures["finished"] += code == 0
        if code:
            print(f"exit code {code}:", (folder / "log").read_text()[-2000:], file=sys.stderr)
        seen, same = _steps(folder, f"k{i}")
        figures["steps"] += len(batches)
        figures["same global batches"] += sum(seen.get(step) == batches[step] for step in batches)
        figures["bitwise equal losses"] += sum(same.get(step) == losses[step] for step in losses)
    return figures


def worlds(folder: Path) -> Figures:
    """Two processes, one, two: the same global batches as one that was never stopped."""
    code, _ = train(folder, _recording(folder / "whole"), "task_name=whole")
    assert code == 0, (folder / "log").read_text()[-3000:]
    for steps, processes in ((6, 2), (10, 1), (16, 2)):
        many = TWO if processes == 2 else ()
        stop = [f"trainer.max_steps={steps}", "scheduler=constant", "task_name=w", "auto_resume=true"]
        code, _ = train(folder, *many, *stop, _recording(folder / "w"))
        assert code == 0, (folder / "log").read_text()[-3000:]
    whole, seen = _steps(folder, "whole")[0], _steps(folder, "w")[0]
    return {"steps": len(whole), "same global batches": sum(seen.get(step) == whole[step] for step in whole)}


def nan(folder: Path, processes: int = 1) -> Figures:
    """A NaN at step 12 is skipped; a NaN for ever ends the run with 70 and its checkpoint as it was."""
    many = TWO if processes == 2 else ()
    poison = f"+callbacks.poison={{_target_: fault_callbacks.Poison, at: 12, rank: {processes - 1}}}"
    once, _ = train(folder, *many, poison, "task_name=once")
    ever, _ = train(folder, *many, f"{poison[:-1]}, for_ever: true}}", "callbacks.guard.patience=3", "task_name=ever")
    (finite,) = folder.glob("logs/once/runs/*/results.json")
    figures = json.loads(finite.read_text())["metrics"]
    kept = newest(folder / "logs" / "ever")
    state = read_file(kept) if kept else {"state_dict": {}, "global_step": None}
    good = all(t.isfinite().all() for t in state["state_dict"].values())
    said = (folder / "log").read_text()
    return {
        "once: exit code": once,
        "once: reported": "step 12 is skipped" in said,
        "once: val/loss": figures["val/loss"],
        "once: skipped": figures.get("train/skipped_steps"),
        "for ever: exit code": ever,
        "for ever: checkpoint of step": state["global_step"],
        "for ever: finite": bool(good),
    }


CAMPAIGNS: dict[str, Callable[[Path, int], Figures]] = {
    "kills": kills, "disk": disk, "flips": flips, "flips_safetensors": flips_safetensors, "resume": resume,
    "resume2": lambda folder, n: resume(folder, n, TWO), "resume_fsdp": lambda folder, n: resume(folder, n, SHARED),
    "worlds": lambda folder, n: worlds(folder), "nan": lambda folder, n: nan(folder),
    "nan2": lambda folder, n: nan(folder, processes=2),
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, count = sys.argv[1], int((sys.argv[2:] or ["20"])[0])
    home = Path(tempfile.mkdtemp(dir=sys.argv[3] if len(sys.argv) > 3 else None))
    try:
        print(name, json.dumps(CAMPAIGNS[name](home, count)))
    finally:
        shutil.rmtree(home, ignore_errors=True)
