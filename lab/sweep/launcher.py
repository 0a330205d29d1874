"""``launcher=NAME``: the launcher of Hydra that runs the jobs of a plan, instead of processes of the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep import seams
from blockwright.lab.sweep.job import LOST, READY, WAITS, fail_after, forwarding, origin, state_of
from blockwright.lab.sweep.table import seconds_of
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import Words, quoted
from blockwright.training import jobs as training_jobs
from blockwright.training.configuration.conf import options as options_of
from blockwright.training.result import Result, record_failure

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

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
    return workers_of(config), {KEY: chosen, **(seams.begin_on(host, config.hydra.launcher) if host else {})}


def _names() -> list[str]:
    """The launchers of Hydra's plug-ins that are installed, and those of files."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # importing them registers their options
    return sorted({*(file.removesuffix(".yaml") for file in ConfigStore.instance().list(GROUP)), *options_of(GROUP)})


def run(directory: Path, plan: Mapping[str, Any], jobs: Collection[int] | None) -> int:
    """Run the unfinished jobs of a plan on its launcher, in a multirun of Hydra; see lab/sweep/launcher.py.

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


# --- the jobs of a plan in rounds -------------------------------------------------------------------------------------


Job = Mapping[str, Any]
FOLDER = "hydra.sweep.subdir"  # of a job in its sweep; a launcher numbers its jobs from the first to the last


class Rounds:
    """The sweeper behind the plug-in; arguments as of Hydra's."""

    def __init__(self, config: DictConfig, context: HydraContext, task: TaskFunction) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.context = config, context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=context, task_function=task
        )
        self.sweep = Path(config.hydra.sweep.dir).absolute()

    def run(self, jobs: Collection[int] | None = None) -> None:
        """Run the unfinished jobs of the plan, then those that follow from their results.

        Args:
            jobs: numbers of the jobs to run, and no others; None: all, and those that follow
        """
        self._run_stage(jobs)
        while jobs is None and plans.grow(self.sweep, plans.read(self.sweep)):
            self._run_stage(None)

    def _run_stage(self, jobs: Collection[int] | None) -> None:
        waiting = [job for job in plans.read(self.sweep)["jobs"] if jobs is None or job["job"] in jobs]
        waiting = [job for job in waiting if not Result.read(self._folder(job)).ended]
        while able := [(job, state) for job in waiting if (state := state_of(self.sweep, job)) != WAITS]:
            for job in [job for job, state in able if state == LOST]:
                fail_after(self.sweep, job)
            self._launch([job for job, state in able if state == READY and self._composes(job)])
            waiting = [job for job in waiting if all(job is not one for one, _ in able)]

    def _launch(self, jobs: Sequence[Job]) -> None:
        if jobs:
            given = [self._overrides(job) for job in jobs]
            for job, returned in zip(jobs, self.launcher.launch(given, jobs[0]["job"]), strict=True):
                self._conclude(self._folder(job), returned)

    def _overrides(self, job: Job) -> list[str]:
        return [*job["overrides"], *origin(self.sweep, job)[0], f"{FOLDER}={job['job']}"]

    def _composes(self, job: Job) -> bool:
        """Whether a job can be composed; one that cannot would end the launcher, and all other jobs with it."""
        try:
            self.context.config_loader.load_sweep_config(self.config, self._overrides(job))
        except Exception as error:
            record_failure(self._folder(job), f"{type(error).__name__}: {error}")
            return False
        return True

    def _conclude(self, folder: Path, returned: JobReturn) -> None:
        """Record an error outside the run, whose own failures are results, and how long the job took."""
        try:
            _ = returned.return_value
        except Exception as error:
            record_failure(folder, f"{type(error).__name__}: {error}")
        result = Result.read(folder)
        if not result.ended:
            result = Result("completed")
        replace(result, wall_seconds=seconds_of(folder) or result.wall_seconds).write(folder)

    def _folder(self, job: Job) -> Path:
        return self.sweep / str(job["job"])
