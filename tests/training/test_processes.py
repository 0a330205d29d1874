"""Every launcher that Lightning knows: which process is the first is what Lightning will say of it."""

from __future__ import annotations

import inspect
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.fabric.plugins import environments
from lightning.fabric.plugins.environments import ClusterEnvironment

from blockwright.registry import ConfigError
from blockwright.training.configuration import placeholders
from blockwright.training.entry.execute import quieten
from blockwright.training.entry.hydra_job import Job
from blockwright.training.entry.ranks import leave_no_folder
from blockwright.training.processes import MARK, environment, is_first

KNOWN = {
    name: cls
    for name, cls in vars(environments).items()
    if inspect.isclass(cls) and issubclass(cls, ClusterEnvironment) and cls is not ClusterEnvironment
}


class Started:
    """What each launcher leaves in the environment of the second of two processes, each on a machine of its own.

    A method for each environment of Lightning, by its name; one that Lightning adds fails the tests until it has one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int) -> None:
        self.monkeypatch, self.folder, self.rank = monkeypatch, folder, rank

    def set(self, **variables: Any) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))

    def module(self, name: str, **members: Any) -> None:
        made = ModuleType(name)
        vars(made).update(members)
        self.monkeypatch.setitem(sys.modules, name, made)

    def TorchElasticEnvironment(self) -> None:  # noqa: N802
        self.set(TORCHELASTIC_RUN_ID="none", RANK=self.rank, GROUP_RANK=self.rank, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
        self.set(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)

    def SLURMEnvironment(self) -> None:  # noqa: N802
        self.set(SLURM_JOB_ID=7, SLURM_JOB_NAME="train", SLURM_NTASKS=2, SLURM_NTASKS_PER_NODE=1, SLURM_NNODES=2)
        self.set(SLURM_STEP_ID=0, SLURM_PROCID=self.rank, SLURM_NODEID=self.rank, SLURM_LOCALID=0)

    def LSFEnvironment(self) -> None:  # noqa: N802
        hosts = self.folder / "hosts"
        hosts.write_text(f"launch\n{socket.gethostname()}\n")
        self.set(LSB_JOBID=7, LSB_DJOB_RANKFILE=hosts, JSM_NAMESPACE_SIZE=2)
        self.set(JSM_NAMESPACE_RANK=self.rank, JSM_NAMESPACE_LOCAL_RANK=0)

    def MPIEnvironment(self) -> None:  # noqa: N802
        world = SimpleNamespace(Get_size=lambda: 2, Get_rank=lambda: self.rank)
        self.module("mpi4py", MPI=SimpleNamespace(COMM_WORLD=world))
        self.monkeypatch.setattr("lightning.fabric.plugins.environments.mpi._MPI4PY_AVAILABLE", True)
        self.set(OMPI_COMM_WORLD_RANK=self.rank, OMPI_COMM_WORLD_SIZE=2)

    def KubeflowEnvironment(self) -> None:  # noqa: N802
        self.set(RANK=self.rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)

    def XLAEnvironment(self) -> None:  # noqa: N802
        runtime = SimpleNamespace(host_index=lambda: self.rank)
        self.module("torch_xla", __spec__=SimpleNamespace(), runtime=runtime)
        xla = "lightning.fabric.plugins.environments.xla"
        self.monkeypatch.setattr(f"{xla}._XLA_AVAILABLE", True)
        self.monkeypatch.setattr(f"{xla}._XLA_GREATER_EQUAL_2_1", True)
        self.monkeypatch.setattr(f"{xla}.XLAAccelerator.is_available", lambda: True)
        KNOWN["XLAEnvironment"].node_rank.cache_clear()

    def LightningEnvironment(self) -> None:  # noqa: N802
        self.set(NODE_RANK=self.rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], None]:
    """Sets the variables of a process that a launcher has started, and no others of any launcher."""
    for name in os.environ:
        if MARK.fullmatch(name) or name.startswith(("SLURM_", "TORCHELASTIC_", "NODE_RANK")):
            monkeypatch.delenv(name)
    return lambda name, rank: getattr(Started(monkeypatch, tmp_path, rank), name)()


@pytest.mark.parametrize("name", KNOWN)
def test_first_process_of_every_launcher_that_lightning_knows_alone_claims_the_folder(
    name: str, started: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Job(tmp_path, swept=False):  # the first process, wherever it was started
        started(name, 1)
        assert type(environment()) is KNOWN[name] and not is_first()
        with Job(tmp_path, swept=False) as other:
            assert not other.first
        monkeypatch.setattr(sys, "argv", ["train.py"])
        leave_no_folder()
        placeholders.choose(str(tmp_path))  # which is not empty
        assert [argument.partition("=")[0] for argument in sys.argv[1:]] == ["hydra.output_subdir", "hydra.run.dir"]
        started(name, 0)
        assert type(environment()) is KNOWN[name] and is_first()
        with pytest.raises(ConfigError, match="still running"), Job(tmp_path, swept=False):
            pass


def test_second_process_on_a_machine_is_not_the_first(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started("LightningEnvironment", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_first()


def test_run_outside_of_slurm_is_silent_on_a_machine_that_has_it(
    started: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with warnings.catch_warnings(action="error"):
        quieten(ignore=False)
        L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        started("LightningEnvironment", 1)
        assert not is_first()


def test_process_that_nothing_has_started_is_the_first(started: Callable[[str, int], None]) -> None:
    assert environment() is None and is_first()


@pytest.mark.parametrize(("name", "unset"), [("SLURMEnvironment", "SLURM_NTASKS_PER_NODE"), ("MPIEnvironment", None)])
def test_processes_that_lightning_would_not_know_as_one_run_are_refused(
    name: str, unset: str | None, started: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started(name, 1)
    if unset:
        monkeypatch.delenv(unset)
    monkeypatch.setattr("lightning.fabric.plugins.environments.mpi._MPI4PY_AVAILABLE", False)
    with pytest.raises(ConfigError) as caught:
        is_first()
    assert caught.value.remedy
