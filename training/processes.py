"""Which of a run's processes this is, asked of Lightning's cluster environments before Lightning builds a trainer."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING

from blockwright.registry import ConfigError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

# Variables that one launcher or another sets, so that a process that none has started does not import Lightning, which
# takes seconds: torchelastic's RANK, LSF's JSM_NAMESPACE_RANK, Open MPI's OMPI_COMM_WORLD_RANK, Lightning's LOCAL_RANK.
MARK = re.compile(r"(.+_)?RANK|SLURM_NTASKS")


def environment() -> ClusterEnvironment | None:
    """The environment that Lightning chooses for this process; None without any sign of a launcher.

    Raises:
        ConfigError: Lightning refuses it
    """
    if not any(map(MARK.fullmatch, os.environ)) and find_spec("torch_xla") is None:
        return None
    from lightning.fabric.plugins.environments import KubeflowEnvironment, LightningEnvironment, XLAEnvironment
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    asked = SimpleNamespace(_cluster_environment_flag=None)
    try:
        with warnings.catch_warnings(action="ignore"):  # srun is installed, and was not used
            chosen = _AcceleratorConnector._choose_and_init_cluster_environment(asked)  # type: ignore[arg-type]
    except RuntimeError as error:  # of Slurm's variables
        rule, _, remedy = str(error).partition(" HINT: ")
        raise ConfigError("SLURM_NTASKS", os.environ.get("SLURM_NTASKS"), rule, remedy) from None
    if type(chosen) is not LightningEnvironment:
        return chosen
    if XLAEnvironment.detect():
        return XLAEnvironment()
    started = next((name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if os.environ.get(name, "1") != "1"), None)
    if started is not None:
        rule = "processes were started by MPI, and without mpi4py each would train alone"
        raise ConfigError(started, os.environ[started], rule, "pip install mpi4py, or start them with torchrun or srun")
    return KubeflowEnvironment() if "RANK" in os.environ else chosen  # it has no variable of its own


def is_first() -> bool:
    """Whether this is the first process of its run, which alone claims the folder, writes and prints.

    Raises:
        ConfigError: Lightning refuses what a launcher has started
    """
    chosen = environment()
    if chosen is None:
        return True
    names = {cls.__name__ for cls in type(chosen).__mro__}
    if "LightningEnvironment" in names:  # which learns the global rank when the trainer runs
        return chosen.node_rank() == chosen.local_rank() == 0
    if "XLAEnvironment" in names:  # this machine's processes are forked when the trainer runs
        return chosen.node_rank() == 0
    return chosen.global_rank() == 0


def launched() -> dict[str, int]:
    """``devices`` and ``num_nodes`` from torchrun or srun, if one of them has started the processes; else nothing."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local}
    a_node = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if "SLURM_STEP_ID" in os.environ and a_node.isdigit() and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return {"devices": int(a_node), "num_nodes": int(os.environ["SLURM_NTASKS"]) // int(a_node)}
    return {}


def queue_again() -> None:
    """Ask Slurm to queue its job again. It refuses a second process of the job that asks, which does no harm."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    subprocess.run(["scontrol", "requeue", f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]], check=False)


def is_out_of_time(signum: int) -> bool:
    """Whether a signal announces that the time of a job of Slurm, which may be queued again, is nearly over."""
    chosen = environment()
    return getattr(chosen, "auto_requeue", False) and getattr(chosen, "requeue_signal", None) == signum
