"""Parse, check and execute the run of one job that Hydra has composed, and report how it ended."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra.core.utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from blockwright import registry
from blockwright.registry import ConfigError, presets
from blockwright.training.checkpoints.find import LAST
from blockwright.training.configuration import config_tree, figures
from blockwright.training.configuration.refusals import refuse_empty
from blockwright.training.configuration.run import Run
from blockwright.training.entry.job import Job
from blockwright.training.entry.preflight import prepare
from blockwright.training.entry.ranks import one_job, overrides
from blockwright.training.jobs import HOST, SWEEP, host_of
from blockwright.training.stops import refuse
from blockwright.training.writing import write_text


def hydra_job(cfg: DictConfig) -> float | None:
    """Run one job, for ``hydra.main``; returns the value for a sweeper."""
    try:
        with Job.of_hydra() as job:
            refuse_empty(cfg, overrides())
            _refuse_idle_launcher()
            run = prepare(cfg, compared=job.swept)
            _check_direction(run, job)
            _execute(run, job)
    except ConfigError as error:
        refuse(error)  # Hydra would print a line and a traceback of an exception
    return job.value


def _refuse_idle_launcher() -> None:
    """Refuse a launcher that hands jobs to a host in a single run: Hydra would ignore it."""
    if host_of(HydraConfig.get().launcher) and HOST not in os.environ:
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        rule = "starts the jobs of a multirun, and this is a single run"
        raise ConfigError("hydra/launcher", launcher, rule, "Add -m")


def _check_direction(run: Run, job: Job) -> None:
    """Refuse a direction of the run's figure that contradicts its sweep's."""
    if (plan := job.plan).get("metric") == run.optimized_metric:
        figures.direction(run, (f"direction of {job.sweep / SWEEP}", plan.get("direction")))


def _execute(run: Run, job: Job) -> None:
    from blockwright.training.entry import cli  # these import Lightning
    from blockwright.training.entry.execute import execute

    shown, printed = run.shown, run.extras["print_config"]
    if job.first:
        cli.export(shown, job.folder)

    def announce() -> None:
        if job.first:
            config_tree.show(shown, job.folder, printed)

    with one_job(job.folder, run.ckpt_path) as arguments:
        metrics = execute(run, announce)
    if run.trainer.get("dry_run"):
        job.value = 0.0
        return
    job.conclude(run, metrics)
    if (run.checkpoints / LAST).exists() and job.first:
        print(f"Continue: {_continuation(arguments, run)}")
    if job.value is None:
        _miss(run, metrics, job)


def _miss(run: Run, metrics: dict[str, float], job: Job) -> None:
    """Refuse a job of a multirun without the figure by which it is compared; warn of a run alone, which has trained."""
    known = registry.did_you_mean(run.optimized_metric, metrics)
    missing = ConfigError("optimized_metric", run.optimized_metric, "no such value was logged", known)
    if job.swept:
        raise missing
    if job.first and run.optimized_metric not in (figures.left_out(run) or ""):
        print(f"warning: {missing}", file=sys.stderr)


def _continuation(arguments: list[str], run: Run) -> str:
    """The command that trains on from a finished run, for twice its steps."""
    kept = [o for o in arguments if not o.startswith(("ckpt_path=", "trainer.max_steps="))]
    steps = run.trainer.get("max_steps", -1)
    longer = [f"trainer.max_steps={2 * steps}"] if steps > 0 else []
    folders = [f"{presets.VARIABLE}={value}" for value in [os.environ.get(presets.VARIABLE)] if value]
    return shlex.join([*folders, "blockwright", "train", *kept, *longer, f"ckpt_path={run.checkpoints / LAST}"])


def _save_settings(cfg: Any, filename: str, output_dir: Path) -> None:
    """As Hydra's, but atomic: a run that resumes writes .hydra/ again, and on a full disk the old files stay."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / filename, OmegaConf.to_yaml(cfg))


hydra.core.utils._save_config = (
    _save_settings  # here, for launchers run jobs in processes that import no more than this
)
