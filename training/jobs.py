"""A job of a sweep from outside: its files in the sweep's folder, the command that runs it, what hosts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULE = "blockwright.train"  # runs a job
TRAIN = ("-m", MODULE)  # Python's arguments for it
SWEEP = "plan.json"  # in a sweep's folder, which contains the jobs' folders
STOP = ".stop"  # likewise: start no further job
HOST = "BLOCKWRIGHT_HOST"  # environment variable of a job that does not run on the machine of its sweep: what runs it


def host_of(launcher: Mapping[str, Any]) -> str | None:
    """The host that a launcher of Hydra hands its jobs to, by the node that configures it; None for this machine."""
    from hydra.utils import get_class  # the list of blocks imports this module, and does without Hydra

    return getattr(get_class(launcher["_target_"]), "host", None)


def sweep_of(folder: str, otherwise: str | None = None) -> str | None:
    """The name of the sweep of which a folder is a job's: ``${sweep_of:${paths.output_dir}}`` groups runs in a logger.

    Args:
        folder: of a run
        otherwise: the answer for a run alone
    """
    sweep = Path(folder).absolute().parent
    return sweep.name if (sweep / SWEEP).is_file() else otherwise
