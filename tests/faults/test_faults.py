"""Faults in small numbers; ``campaign.py`` has them by the hundred, of the same functions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

pytestmark = pytest.mark.xdist_group("programs")  # they start commands, as others of this group
CAMPAIGN = Path(__file__).with_name("campaign.py")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def campaign(warm: Warm, environment: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a campaign in a process of its own, for it forks; gives its figures."""
    import json

    def run(name: str, n: int, seconds: int = 900, folder: Path = tmp_path) -> dict[str, Any]:
        command = [str(CAMPAIGN), name, str(n), str(folder)]
        done = warm.run(*command, cwd=tmp_path, env=environment, timeout=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1].partition(" ")[2])

    return run


def test_kill_amid_saves_damages_nothing_and_leaves_nothing_behind(campaign: Callable[..., dict[str, Any]]) -> None:
    elsewhere = Path("/dev/shm")
    figures = campaign("kills", 8, folder=elsewhere) if elsewhere.is_dir() else campaign("kills", 8)
    assert figures["kills"] == 8 and figures["saves"] > 1 and figures["amid a save"] > 0
    assert figures["damaged at a final path"] == figures["left over"] == figures["nothing to load"] == 0


@pytest.mark.slow
@needs_root
def test_full_disk_leaves_the_last_good_checkpoint(campaign: Callable[..., dict[str, Any]]) -> None:
    figures = campaign("disk", 10)
    assert figures == {"full disks": 10, "refused in one message": 10, "last good one intact": 10, "left over": 0}


@pytest.mark.slow
def test_a_hundred_turned_bits_are_noticed_in_each_format(campaign: Callable[..., dict[str, Any]]) -> None:
    for found in campaign("flips", 100).values():
        assert found == {"flips": 100, "noticed": 100, "fell back": 100, "good again": True}


def test_turned_bit_changes_no_exported_weight_unnoticed(campaign: Callable[..., dict[str, Any]]) -> None:
    figures = campaign("flips_safetensors", 60)
    assert figures["flips"] == 60 and figures["unnoticed"] == 0 and figures["noticed"] > 45


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("resume", 2), ("resume_fsdp", 1)])
def test_killed_run_resumes_as_if_it_had_never_been(name: str, n: int, campaign: Callable[..., dict[str, Any]]) -> None:
    figures = campaign(name, n)
    assert figures["kills"] == figures["finished"] == n
    assert figures["steps"] == figures["same global batches"] == figures["bitwise equal losses"] == 16 * n


@pytest.mark.slow
def test_number_of_processes_may_change(campaign: Callable[..., dict[str, Any]]) -> None:
    assert campaign("worlds", 1) == {"steps": 16, "same global batches": 16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nan", "nan2"])
def test_nan_costs_a_step_and_for_ever_ends_the_run(name: str, campaign: Callable[..., dict[str, Any]]) -> None:
    figures = campaign(name, 1)
    assert figures["once: exit code"] == 0 and figures["once: skipped"] == 1 and figures["once: reported"]
    assert figures["for ever: exit code"] == 70 and figures["for ever: finite"]


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
}  # fmt: skip


@pytest.mark.slow
def test_slurm_job_is_queued_again_and_resumes(small, train_py, tmp_path):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "slurm_callback.py").write_text(
        "import os\nimport lightning as L\n\n\nclass Warns(L.Callback):\n"
        "    observes = 'sends signals'\n\n"
        "    def on_train_batch_start(self, trainer, task, batch, batch_idx):\n"
        f"        if trainer.global_step == 2:\n            os.kill(os.getpid(), {int(signal.SIGUSR1)})\n\n\n"
        "class WarnsEarly(L.Callback):\n"
        "    observes = 'sends signals'\n\n"
        f"    def __init__(self):\n        os.kill(os.getpid(), {int(signal.SIGUSR1)})\n"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [*small, "auto_resume=true", "task_name=job", f"paths.log_dir={tmp_path}/logs"]
    early = [*command, "+callbacks.warns={_target_: slurm_callback.WarnsEarly}"]
    begun = train_py(*early, PATH=path, PYTHONPATH=str(tmp_path), **SLURM)  # while data are prepared, say
    assert begun.returncode == 75 and (tmp_path / "asked").read_text() == "requeue 77\n", begun.stdout + begun.stderr
    (tmp_path / "asked").unlink()
    warned = [*command, "+callbacks.warns={_target_: slurm_callback.Warns}"]
    first = train_py(*warned, PATH=path, PYTHONPATH=str(tmp_path), **SLURM)
    assert first.returncode == 75, first.stdout + first.stderr
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    second = train_py(*command, PATH=path, **SLURM)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "step=3 train" not in second.stdout and "step=4 train" in second.stdout  # a validation is done over


@pytest.fixture
def machines(warm: Warm, environment: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs over two machines in a process of its own; gives what became of it."""
    import json

    def run(fault: str, steps: int = 14, *overrides: str) -> dict[str, Any]:
        told = f"machines.run(machines.Path('.').resolve(), {fault!r}, {steps}, *{overrides!r})"
        program = f"import json, machines; print(json.dumps({told}, default=list))"
        env = {**environment, "PYTHONPATH": str(CAMPAIGN.parent)}
        done = warm.run("-c", program, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _val_loss(folder: Path, task: str) -> float:
    import json

    (results,) = folder.glob(f"logs/{task}/runs/*/results.json")
    return json.loads(results.read_text())["metrics"]["val/loss"]


@pytest.fixture(scope="module")
def loss_of_one_process(warm: Warm, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("one")
    words = ("trainer.max_steps=14", "optimizer=adamw")
    program = f"import campaign; from pathlib import Path; print(campaign.train(Path('.').resolve(), *{words!r}))"
    env = {**environment, "PYTHONPATH": str(CAMPAIGN.parent)}
    done = warm.run("-c", program, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return _val_loss(folder, "train")


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(("fault", "codes"), [("rank", [0, 0]), ("node", [0, -9])])
def test_run_resumes_by_itself_when_a_rank_or_a_machine_is_lost(fault, codes, machines, tmp_path, loss_of_one_process):
    """And ends as that of one process which never stopped."""
    found = machines(fault, 14, "optimizer=adamw")
    assert found["codes"] == codes and sorted(map(int, found["steps"])) == list(range(1, 15))
    assert fault == "node" or all(len(losses) == 1 for losses in found["steps"].values())  # also of steps taken twice
    assert found["recovery"] < 60 and found["exit"] < 60  # a timeout of the collectives would be minutes
    assert _val_loss(tmp_path, "train") == pytest.approx(loss_of_one_process, rel=1e-5)
