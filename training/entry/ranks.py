"""The processes of one job: the ranks that Lightning or torchrun starts, and what they must not share."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, read_write

from training import jobs
from training.configuration.overrides import config_flags, kept, quoted

LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_child() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0"


def overrides() -> list[str]:
    """The job's own, as they were written: ``${…}`` in one is the configuration's to resolve."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[return-value]


def pin_children(directory: Path, checkpoint: str | None = None) -> list[str]:
    """Make Lightning's child processes repeat this job and nothing else.

    Its launcher runs ``sys.argv`` again for every other rank. In a sweep that would be the whole sweep, with a
    sampler's ranks meeting at different trials. So ``sys.argv`` becomes this job's own overrides, one run and no sweep
    even where an experiment's file asks for one, Hydra's run directory the job's, and the checkpoint to resume from
    the one that was found here, if any: they do not search.

    Returns:
        what a command of this job alone takes: where its configuration is, and its overrides
    """
    config = HydraConfig.get()
    own = overrides()
    where = [*config_flags(sys.argv[1:]), *kept(config.overrides.hydra)]
    found = ["auto_resume=false", *([f"ckpt_path={quoted(checkpoint)}"] if checkpoint else [])]
    program, main_module = sys.argv[0], sys.modules["__main__"]
    if main_module.__spec__ is not None and main_module.__file__ != str(jobs.TRAIN):
        # A job that joblib or submitit runs: theirs is the module that the launcher would start again.
        program, main_module.__spec__ = str(jobs.TRAIN), None
    sys.argv = [program, *where, "hydra.mode=RUN", *own, *found]
    with read_write(config):  # type: ignore[arg-type] # typed as its schema, it is a node
        config.run.dir = str(directory)
    return [*where, *own]


def reset_processes(before: dict[str, str | None]) -> None:
    """Leave no process group behind: the next job of a sweep makes its own.

    Args:
        before: what the variables that Lightning's launcher sets were before it did
    """
    from training.entry.run import leave_processes

    leave_processes()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def leave_no_folder() -> None:
    """Under torchrun every rank composes for itself: but for the first, they leave no folder of a run.

    A folder that is named is the same for all, who look there for the checkpoint to resume from.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        sys.argv.append("hydra.output_subdir=null")
        if not any(argument.startswith("hydra.run.dir=") for argument in sys.argv):
            sys.argv.append(f"hydra.run.dir={tempfile.mkdtemp(prefix='blockwright-rank-')}")
