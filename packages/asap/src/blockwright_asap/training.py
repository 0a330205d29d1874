"""Train a correction with Blockwright's own command, in a folder of the study."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright_asap.study import Study, alone

QUIET = (
    *("logger=none", "test=false", "callbacks.report.sample_tokens=0"),
    *("callbacks.throughput=null", "auto_resume=true"),
)


def train(
    study: Study, base: str, corrects: str = "action", drift: Sequence[Path] = (), changes: Sequence[str] = ()
) -> Path:
    """Run ``experiment=asap_delta``, unless its folder holds the finished run; one that was killed is continued.

    Args:
        study: whose rollouts are learnt from
        base, corrects, drift: as in ``data``
        changes: further overrides, such as ``model/attention=gqa``

    Returns:
        the run's folder

    Raises:
        RuntimeError: the command failed; its last lines
    """
    name = "_".join(["delta", base, corrects, *([f"round{len(drift)}"] if drift else []), *map(_plain, changes)])
    folder = study.folder / name
    with alone(study.folder, name):
        return _trained(study, folder, base, corrects, drift, changes)


def _trained(
    study: Study, folder: Path, base: str, corrects: str, drift: Sequence[Path], changes: Sequence[str]
) -> Path:
    settings, name, results = study.settings, folder.name, folder / "results.json"
    if results.exists() and json.loads(results.read_text())["status"] == "completed":
        return folder
    given = {
        "seed": settings.seed,
        "task_name": name,
        "hydra.run.dir": f"'{folder}'",
        "data.folder": f"'{study.folder}'",
        **{f"data.{key}": getattr(settings, key) for key in ("gap", "iterations", "robots", "episodes", "held_out")},
        "data.base": base,
        "data.corrects": corrects,
        "data.drift": f"[{','.join(repr(str(run)) for run in drift)}]",
    }
    words = [f"{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "blockwright", "train", "experiment=asap_delta", *words, *QUIET, *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join([f"{name} failed:", *done.stderr.splitlines()[-8:]]))
    return folder


def _plain(override: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in override.partition("/")[2] or override)
