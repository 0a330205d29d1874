"""Faults in small numbers; ``campaign.py`` has them by the hundred, of the same functions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def campaign(environment: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a campaign in a process of its own, for it forks; gives its figures."""
    import json

    def run(name: str, n: int, seconds: int = 900, folder: Path = tmp_path) -> dict[str, Any]:
        command = [sys.executable, str(CAMPAIGN), name, str(n), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1].partition(" ")[2])

    return run


def test_kill_amid_saves_damages_nothing_and_leaves_nothing_behind(campaign: Callable[..., dict[str, Any]]) -> None:
    """On another file system than the temporary folder, where there is one."""
    elsewhere = Path("/dev/shm")
    figures = campaign("kills", 12, folder=elsewhere) if elsewhere.is_dir() else campaign("kills", 12)
    assert figures["kills"] == 12 and figures["saves"] > 3 and figures["amid a save"] > 1
    assert figures["damaged at a final path"] == figures["left over"] == figures["nothing to load"] == 0


@pytest.mark.slow
@needs_root
def test_full_disk_leaves_the_last_good_checkpoint(campaign: Callable[..., dict[str, Any]]) -> None:
    figures = campaign("disk", 20)
    assert figures == {"full disks": 20, "refused in one message": 20, "last good one intact": 20, "left over": 0}


@pytest.mark.slow
def test_three_hundred_turned_bits_are_noticed_in_each_format(campaign: Callable[..., dict[str, Any]]) -> None:
    for found in campaign("flips", 300).values():
        assert found == {"flips": 300, "noticed": 300, "fell back": 300, "good again": True}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("resume", 4), ("resume2", 2)])
def test_killed_run_goes_on_as_if_it_had_never_been(name: str, n: int, campaign: Callable[..., dict[str, Any]]) -> None:
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
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
}


@pytest.mark.slow
def test_slurm_job_is_queued_again_and_goes_on(
    small: list[str], train_py: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "slurm_guest.py").write_text(
        "import os\nimport lightning as L\n\n\nclass Warns(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, task, batch, batch_idx):\n"
        f"        if trainer.global_step == 2:\n            os.kill(os.getpid(), {int(signal.SIGUSR1)})\n"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [*small, "auto_resume=true", "task_name=job", f"paths.log_dir={tmp_path}/logs"]
    warned = [*command, "+callbacks.warns={_target_: slurm_guest.Warns}"]
    first = train_py(*warned, PATH=path, PYTHONPATH=str(tmp_path), **SLURM)
    assert first.returncode == 75, first.stdout + first.stderr
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    second = train_py(*command, PATH=path, **SLURM)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "step=3 train" not in second.stdout and "step=4 train" in second.stdout  # a validation is done over


@pytest.mark.slow
@needs_root
def test_torchrun_starts_again_from_the_checkpoint_when_a_rank_dies(
    small: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """Two machines on one cable, a rank on each; that of the second is killed once."""
    from tools import Started, two_machines

    root = CAMPAIGN.parent.parent.parent
    (tmp_path / "dies_guest.py").write_text(
        "import os, signal\nfrom pathlib import Path\nimport lightning as L\n\n\nclass Dies(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, task, batch, batch_idx):\n"
        "        once = Path('died')\n"
        "        if trainer.global_rank == 1 and trainer.global_step == 9 and not once.exists():\n"
        "            once.write_text('')\n            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    made = ["trainer=ddp_sim", "trainer.devices=1", "+trainer.num_nodes=2", "auto_resume=true", "trainer.max_steps=14"]
    made += ["callbacks.interruption.every_n_steps=2", f"paths.root_dir={tmp_path}"]
    made += ["+callbacks.dies={_target_: dies_guest.Dies}"]
    env = {**environment, "PYTHONPATH": f"{tmp_path}:{root}", "GLOO_SOCKET_IFNAME": "v1"}
    with two_machines("bwt") as machines:
        running = []
        for i, before in enumerate(machines):
            rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29411", "--rdzv-id=7", "--max-restarts=3"]
            local = [f"--local-addr=10.77.0.{i + 1}", "--nnodes=2", "--nproc-per-node=1"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", *local, *rendezvous]
            command = [*before, *torchrun, str(root / "train.py"), *small, *made]
            running.append(Started(command, tmp_path / f"log{i}", tmp_path, env))
        try:
            codes = [one.process.wait(timeout=500) for one in running]
        finally:
            for one in running:
                one.end()
    said = (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert codes == [0, 0], said[-4000:]
    assert (tmp_path / "died").exists() and "step=14 " in said
