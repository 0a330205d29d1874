"""The processes of one job, started by Lightning or torchrun, and their separation."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, read_write

from blockwright.registry.command import quoted
from blockwright.training import jobs
from blockwright.training.configuration.conf import config_flags, kept
from blockwright.training.processes import is_first

LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def overrides() -> list[str]:
    """The job's own overrides, with ``${…}`` unresolved."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[return-value]


def pin_children(directory: Path, checkpoint: str | None = None) -> list[str]:
    """Make Lightning's child processes run this job only.

    Its launcher runs ``sys.argv`` again for every other rank. In a sweep that would be the whole sweep, with ranks in
    different trials. So ``sys.argv`` becomes this job's overrides, as a single run even if an experiment's file
    configures a sweep, with the job's run directory, and the checkpoint found here to resume from, if any.

    Returns:
        arguments for running this job alone: the location of its configuration, and its overrides
    """
    config = HydraConfig.get()
    own = overrides()
    where = [*config_flags(sys.argv[1:]), *kept(config.overrides.hydra)]
    found = ["auto_resume=false", *([f"ckpt_path={quoted(checkpoint)}"] if checkpoint else [])]
    main_module = sys.modules["__main__"]
    if main_module.__spec__ is not None:  # also of a job that joblib or submitit runs
        main_module.__spec__ = importlib.util.find_spec(jobs.MODULE)
    sys.argv = [sys.argv[0], *where, "hydra.mode=RUN", *own, *found]
    with read_write(config):  # type: ignore[arg-type] # typed as its schema, it is a node
        config.run.dir = str(directory)
    return [*where, *own]


@contextmanager
def one_job(directory: Path, checkpoint: str | None) -> Iterator[list[str]]:
    """Context in which the processes of this job only run, and after which the next one creates its own.

    Args:
        directory: of the run
        checkpoint: to resume from

    Yields:
        arguments for running this job alone, as of ``pin_children``
    """
    from blockwright.training.entry.execute import leave_processes

    before = {name: os.environ.get(name) for name in LAUNCHED}  # Lightning's launcher sets them
    try:
        yield pin_children(directory, checkpoint)
    finally:
        leave_processes()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def leave_no_folder() -> None:
    """Let only the first process make the run's folder, where a launcher starts several that compose for themselves.

    The others learn of it from the first, when the trainer runs; what Hydra makes for them is removed at their end. A
    configured folder is kept, since all look there for the checkpoint to resume from.
    """
    if not is_first():
        sys.argv.append("hydra.output_subdir=null")
        if not any(argument.startswith("hydra.run.dir=") for argument in sys.argv):
            folder = tempfile.mkdtemp(prefix="blockwright-rank-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            sys.argv.append(f"hydra.run.dir={folder}")


# --- recognise the error of a rank whose peer has gone ----------------------------------------------------------------


WORDS = re.compile(
    r"connection (closed|reset) by peer|connection was likely closed|connectFullMesh failed|broken pipe"
    r"|socket (timeout|closed)|remote process exited|ncclRemoteError|ncclSystemError|NCCL communicator was aborted"
    r"|watchdog.*timeout|timed out waiting \d+ms for (recv|send)|rank \d+ (has|is) (terminated|lost)"
    r"|store.*(closed|timed? ?out)",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that another rank has gone."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        named = {cls.__name__ for cls in type(cause).__mro__}
        if named & {"DistNetworkError", "DistStoreError"}:
            return True
        if "RuntimeError" in named and WORDS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
