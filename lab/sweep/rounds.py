"""The jobs of a plan in rounds: a launcher of Hydra runs those that can start, then those that can start after them.

This is the alternative to lab/sweep/runner.py, which starts a process for each job. A job leaves the same files, so a
sweep that was killed continues with what is unfinished.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.job import LOST, READY, WAITS, fail_after, origin, state_of
from blockwright.lab.sweep.progress import seconds_of
from blockwright.training.result import Result, record_failure

Job = Mapping[str, Any]
FOLDER = "hydra.sweep.subdir"  # of a job in its sweep; a launcher numbers its jobs from the first to the last


class Rounds:
    """The sweeper behind the plug-in; arguments as of Hydra's."""

    def __init__(self, config: DictConfig, context: HydraContext, task: TaskFunction) -> None:
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
