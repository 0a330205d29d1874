"""``launcher=NAME``: the launcher of Hydra that runs the jobs of a plan, instead of processes of the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blockwright.lab.sweep import hosts
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.job import forwarding
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.words import Words, quoted
from blockwright.training import jobs as training_jobs
from blockwright.training.configuration.conf import options as options_of

KEY = "launcher"  # of a command and of plan.json
GROUP, OPTIONS = "hydra/launcher", "hydra.launcher."


def take(words: Words) -> tuple[Words, dict[str, Any]]:
    """Take the launcher out of the words of a command.

    Args:
        words: with ``launcher`` among the settings, and its options among the overrides

    Returns:
        the other words, with ``workers`` as the launcher has them; and what the plan keeps, which is nothing without a
        launcher

    Raises:
        ConfigError: no such launcher or option, an option without a launcher, or ``workers`` with one
    """
    options = [word for word in words.overrides if word.lstrip("+~").startswith(OPTIONS)]
    others = [word for word in words.overrides if word not in options]
    settings = {key: value for key, value in words.settings.items() if key != KEY}
    name = words.settings.get(KEY)
    if name is None:
        for key, _, value in (option.partition("=") for option in options):
            raise ConfigError(key, value, "is an option of a launcher, and none is named", "Add launcher=joblib, say")
        return words, {}
    if "workers" in settings:
        rule = "is how many processes the command starts, and the launcher starts the jobs"
        raise ConfigError("workers", settings["workers"], rule, "Write hydra.launcher.n_jobs=2, say; or no launcher")
    workers, plan = _composed(name, options)
    return Words({**settings, "workers": str(workers)}, others, words.names), plan


def _composed(name: str, options: list[str]) -> tuple[int, dict[str, Any]]:
    """How many jobs a launcher runs at a time, and what a plan keeps of it."""
    from blockwright.lab.sweep.callback import workers_of  # Hydra, which --help does without
    from blockwright.training.configuration.composing import compose_with_hydra

    if name not in (known := _names()):
        raise ConfigError(KEY, name, "is not a launcher that is installed", did_you_mean(name, known))
    for option in options:
        if "_target_" in option:
            raise ConfigError(f"{OPTIONS}_target_", option, "is set by the launcher's name", "Leave it out")
    chosen = [f"{GROUP}={name}", *options]
    config = compose_with_hydra(chosen)
    if config.hydra.launcher.get("n_jobs") == 0:
        raise ConfigError(
            f"{OPTIONS}n_jobs", 0, "is the number of parallel jobs", "Write 1 or more, or -1 for all cores"
        )
    host = training_jobs.host_of(config.hydra.launcher)
    return workers_of(config), {KEY: chosen, **(hosts.begin(host, config.hydra.launcher) if host else {})}


def _names() -> list[str]:
    """The launchers of Hydra's plug-ins that are installed, and those of files."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # importing them registers their options
    return sorted({*(file.removesuffix(".yaml") for file in ConfigStore.instance().list(GROUP)), *options_of(GROUP)})


def run(directory: Path, plan: Mapping[str, Any], jobs: Collection[int] | None) -> int:
    """Run the unfinished jobs of a plan on its launcher, in a multirun of Hydra; see lab/sweep/rounds.py.

    It has a session of its own: Ctrl-C reaches it once, from this process.

    Args:
        directory: of the sweep
        plan: its plan
        jobs: as of ``lab.sweep.runner.run_plan``, as is the exit code that it returns
    """
    arguments = [*plan.get("flags", []), "hydra/sweeper=plan", *plan[KEY], "hydra.mode=MULTIRUN"]
    arguments += [f"hydra.sweep.dir={quoted(directory)}", f"task_name={quoted(str(plan.get('name', 'sweep')))}"]
    if jobs is not None:
        arguments.append(f"hydra.sweeper.jobs=[{','.join(map(str, jobs))}]")
    process = subprocess.Popen(
        [sys.executable, *training_jobs.TRAIN, *arguments],
        stdin=subprocess.DEVNULL,
        cwd=plan.get("cwd"),
        env={**os.environ, plans.RESUMED: str(directory)},
        start_new_session=True,
    )
    with forwarding(process):
        code = process.wait()
    return code if code >= 0 else 128 - code
