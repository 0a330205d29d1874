"""Parse, check and execute the run of one job that Hydra has composed, and report how it ended."""

from __future__ import annotations

import io
import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra.core.utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.text import Text
from rich.tree import Tree

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json, write_text
from blockwright.registry.printing import console
from blockwright.training.checkpoints.find import LAST
from blockwright.training.checkpoints.record import Change, Past, changes, record, table
from blockwright.training.claims import only_writer
from blockwright.training.configuration import figures
from blockwright.training.configuration.composing import compose_config, refuse_empty
from blockwright.training.configuration.run import Run
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import prepare
from blockwright.training.entry.ranks import one_job, overrides
from blockwright.training.jobs import HOST, STOP, SWEEP, host_of
from blockwright.training.processes import is_first
from blockwright.training.result import Diverged, Interrupted, Pruned, Result, record_failure, refuse

# --- the life of a job: one run in its folder, claimed, run, concluded and released by this process ---


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


# --- the composed configuration as a tree: on the screen, and in the run directory ---


MOST = 30  # settings in the list of what differs
PARTS = ("model", "data", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger", "paths", "extras")


def show(plain: Mapping[str, Any], directory: Path, print_config: bool, differing: Sequence[Change] = ()) -> None:
    """Save the tree as ``config_tree.log``; print it if ``print_config``, else where it is, and what differs.

    Args:
        plain: every setting
        directory: of the run
        print_config: whether to print the tree
        differing: the settings that are not those of ``blockwright train`` alone
    """
    tree = Tree("configuration")
    for key in [*PARTS, *(k for k in plain if k not in PARTS)]:
        _grow(tree, key, plain[key])
    text, saved = io.StringIO(), directory / "config_tree.log"
    console(text).print(tree)
    write_text(saved, text.getvalue())
    if print_config:
        console().print(tree)
    else:
        more = f"\n  … and {len(differing) - MOST} more" if len(differing) > MOST else ""
        print(f"Configuration: {saved}" + (f"; it differs from the defaults in {len(differing)}:" if differing else ""))
        if differing:
            print(table(differing[:MOST], "default") + more)


def _grow(tree: Tree, key: str, value: Any) -> None:
    if isinstance(value, Mapping) and value:
        branch = tree.add(Text(str(key), style="bold"))
        for inner, below in value.items():
            _grow(branch, inner, below)
    else:
        tree.add(Text.assemble((str(key), "cyan"), f": {value}"))


def hydra_job(cfg: DictConfig) -> float | None:
    """Run one job, for ``hydra.main``; returns the value for a sweeper."""
    try:
        with Job.of_hydra() as job:
            refuse_empty(cfg, overrides())
            # Refuse a launcher that hands jobs to a host in a single run: Hydra would ignore it
            if host_of(HydraConfig.get().launcher) and HOST not in os.environ:
                launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
                rule = "starts the jobs of a multirun, and this is a single run"
                raise ConfigError("hydra/launcher", launcher, rule, "Add -m")
            run = prepare(cfg, compared=job.swept)
            # Refuse a direction of the run's figure that contradicts its sweep's
            if (plan := job.plan).get("metric") == run.optimized_metric:
                figures.direction(run, (f"direction of {job.sweep / SWEEP}", plan.get("direction")))
            from blockwright.training.entry import cli  # these import Lightning
            from blockwright.training.entry.execute import execute

            shown, printed = run.shown, run.extras["print_config"]
            if job.first:
                cli.export(shown, job.folder)

            def announce() -> None:
                if job.first:
                    show(shown, job.folder, printed, [] if printed or job.in_sweep else _differing(run))

            with one_job(job.folder, run.ckpt_path) as arguments:
                metrics = execute(run, announce)
            if run.trainer.get("dry_run"):
                job.value = 0.0
                return job.value
            job.conclude(run, metrics)
            if (run.checkpoints / LAST).exists() and job.first:
                # The command that trains on from a finished run, for twice its steps
                kept = [o for o in arguments if not o.startswith(("ckpt_path=", "trainer.max_steps="))]
                steps = run.trainer.get("max_steps", -1)
                longer = [f"trainer.max_steps={2 * steps}"] if steps > 0 else []
                continuation = shlex.join(
                    ["blockwright", "train", *kept, *longer, f"ckpt_path={run.checkpoints / LAST}"]
                )
                print(f"Continue: {continuation}")
            if job.value is None:
                _miss(run, metrics, job)
    except ConfigError as error:
        refuse(error)  # Hydra would print a line and a traceback of an exception
    return job.value


def _differing(run: Run) -> list[Change]:
    """The settings of a run that are not those of ``blockwright train`` alone; none if that cannot be composed."""
    if not overrides():
        return []
    try:
        standard = parse_settings(compose_config([], output_dir=str(run.folder)))
    except ConfigError:  # the user's own defaults may need a value
        return []
    return changes(Past(record(standard.shown), complete=True, step=0, rate=None), record(run.shown))


def _miss(run: Run, metrics: dict[str, float], job: Job) -> None:
    """Refuse a job of a multirun without the figure by which it is compared; warn of a run alone, which has trained."""
    known = registry.did_you_mean(run.optimized_metric, metrics)
    missing = ConfigError("optimized_metric", run.optimized_metric, "no such value was logged", known)
    if job.swept:
        raise missing
    if job.first and run.optimized_metric not in (figures.left_out(run) or ""):
        print(f"warning: {missing}", file=sys.stderr)


def _save_settings(cfg: Any, filename: str, output_dir: Path) -> None:
    """As Hydra's, but atomic: a run that resumes writes .hydra/ again, and on a full disk the old files stay."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / filename, OmegaConf.to_yaml(cfg))


hydra.core.utils._save_config = (
    _save_settings  # here, for launchers run jobs in processes that import no more than this
)
