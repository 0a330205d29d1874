"""The life of a job: one run in its folder, claimed, run, concluded and released by this process."""

from __future__ import annotations

import math
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json
from blockwright.training.claims import only_writer
from blockwright.training.configuration import figures
from blockwright.training.configuration.run import Run
from blockwright.training.jobs import HOST, STOP, SWEEP
from blockwright.training.processes import is_first
from blockwright.training.result import Result, record_failure
from blockwright.training.stops import Diverged, Interrupted, Pruned


class Job:
    """The context of a run in its folder, which it claims and releases.

    A run alone refuses a folder in which another runs, and its errors reach the caller. Of a multirun, the folder is
    its sweep's; a failure becomes a row of the table, with the worst value, and the sweep continues.

    Args:
        folder: of the run
        swept: whether Hydra runs it as one of a multirun; a job of a sweep may also run by itself

    Attributes:
        value: what a sweeper receives: the figure by which runs are compared; None if it was not measured

    Raises:
        ConfigError: another process of this machine runs in the folder
        Interrupted: the sweep is being stopped
    """

    def __init__(self, folder: Path, swept: bool) -> None:
        self.folder, self.sweep, self.swept = folder, folder.parent, swept
        self.in_sweep = swept or (self.sweep / SWEEP).is_file()
        self.first = is_first()  # of the processes of the run
        self.value: float | None = None
        self._claim = ExitStack()

    @classmethod
    def of_hydra(cls) -> Job:
        """The job that Hydra runs now."""
        config = HydraConfig.get()
        return cls(Path(config.runtime.output_dir), config.mode == RunMode.MULTIRUN)

    def __enter__(self) -> Job:
        if self.swept and (self.sweep / STOP).exists():
            raise Interrupted(None, 0, signal.SIGTERM, self.sweep)
        if self.first and not (self.in_sweep and HOST in os.environ):  # a host knows its jobs
            with ExitStack() as claim:
                alone = claim.enter_context(only_writer(self.folder))
                if not (alone or self.in_sweep):
                    rule = "is the folder of a run that is still running, whose files this one would overwrite"
                    remedy = "Wait for it, or name another hydra.run.dir"
                    raise ConfigError("hydra.run.dir", str(self.folder), rule, remedy)
                self._claim = claim.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        with self._claim:  # released at the end
            if isinstance(error, Interrupted) and self.swept:
                error.sweep = self.sweep
            return self.swept and isinstance(error, Exception) and self._fail(error)

    def _fail(self, error: Exception) -> bool:
        """Record a job that ended early as a row of the sweep's table."""
        status = {Diverged: "diverged", Pruned: "pruned"}.get(type(error), "failed")
        expected = isinstance(error, ConfigError | Diverged | Pruned)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        self.value, measured = self.worst, {}
        if isinstance(error, Pruned):
            self.value, measured = error.value, {error.monitor: error.value}
        record_failure(self.folder, reason, status, measured)
        return True

    def conclude(self, run: Run, metrics: dict[str, float]) -> None:
        """Write the result of a sweep's job that has no ``callbacks.report``, and choose the value for the sweeper."""
        if self.in_sweep and self.first and not Result.read(self.folder).ended:
            declared = {name: of for name in metrics if (of := figures.declaration(name, run)) is not None}
            Result("completed", metrics=metrics, figures=declared).write(self.folder)
        self.value = metrics.get(run.optimized_metric)
        if self.value is not None and not math.isfinite(self.value):
            self.value = self.worst

    @property
    def plan(self) -> dict[str, Any]:
        """The plan of the sweep that this job is one of; empty for a run alone."""
        try:
            plan = read_json(self.sweep, SWEEP)
        except ConfigError:
            return {}
        return plan if isinstance(plan, dict) else {}

    @property
    def worst(self) -> float:
        """The value of a failed or diverged job for a sweeper; some do not support NaN."""
        return -math.inf if self.plan.get("direction") == "maximize" else math.inf
