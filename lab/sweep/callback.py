"""Files and output of a multirun: the plan before the first job, a line after each, the table at the end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep import seams
from blockwright.registry import ConfigError
from blockwright.registry.reading import checked
from blockwright.training import claims
from blockwright.training.configuration import figures
from blockwright.training.configuration.conf import config_flags, kept
from blockwright.training.configuration.run import HINTS
from blockwright.training.jobs import STOP, host_of
from blockwright.training.result import SIGNALS, Interrupted, refuse

PATIENCE_S = 120  # time for jobs to finish their step and save
SUBDIR = "${hydra.job.num}"
PLAN_SWEEPER = "hydra_plugins.blockwright_plan.sweeper.PlanSweeper"
SWEEPER = "hydra_plugins.blockwright_optuna.sweeper.ResumableOptunaSweeper"


class SweepCallback(Callback):
    """Hydra callback of a multirun: writes ``plan.json``, reports each job, ends with ``summary.csv``.

    It locks the sweep for the multirun; each job locks its own folder, in whichever process it runs.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir).absolute()
        try:
            sweep.mkdir(parents=True, exist_ok=True)
            claims.take_sweep(sweep)  # until this process ends; first, as another sweep here may have written the plan
            begin(sweep, config, sys.argv[1:])
        except ConfigError as error:  # Hydra would only warn of an exception in a callback
            refuse(error)
        (sweep / STOP).unlink(missing_ok=True)
        elsewhere = not str(config.hydra.launcher.get("_target_")).endswith(".BasicLauncher")
        for signum in SIGNALS:
            signal.signal(signum, partial(stop_jobs if elsewhere else stop_sweep, sweep))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        if config.hydra.mode != RunMode.MULTIRUN or not (folder.parent / plans.PLAN).exists():
            return
        from blockwright.lab.sweep.table import ended_line  # not for a run alone

        plan = plans.read(folder.parent)
        print(ended_line(folder.parent, plan, int(folder.name), plan["workers"]), flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from blockwright.lab.sweep.table import exit_code, summarise

        if code := exit_code(summarise(Path(config.hydra.sweep.dir))):
            sys.exit(code)


def stop_sweep(sweep: Path, signum: int, frame: FrameType | None) -> None:
    """A signal handler for when there is nothing to save, between the jobs of this process.

    Raises:
        Interrupted
    """
    raise Interrupted(None, 0, signum, sweep)


def stop_jobs(sweep: Path, signum: int, frame: FrameType | None) -> None:
    """Forward a signal to the jobs that a launcher runs in other processes, and wait until they have saved.

    Raises:
        Interrupted
    """
    for one in SIGNALS:
        signal.signal(one, partial(stop_sweep, sweep))
    (sweep / STOP).touch()  # stops the launcher from starting further jobs
    jobs = [folder for folder in sweep.iterdir() if folder.name.isdigit()]
    for process in filter(None, map(claims.holder, jobs)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    until = time.monotonic() + PATIENCE_S
    while any(map(claims.is_taken, jobs)) and time.monotonic() < until:
        time.sleep(0.1)
    raise Interrupted(None, 0, signum, sweep)


def begin(sweep: Path, config: DictConfig, arguments: list[str]) -> None:
    """Write the plan of a multirun.

    Args:
        sweep: its folder
        config: as composed, ``hydra`` included
        arguments: the process's

    Raises:
        ConfigError: the folder holds another sweep
    """
    sweeper, flags = config.hydra.sweeper, config_flags(arguments)
    given: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)  # no password may be written
    argv = [*flags, *given["hydra"], *given["task"]]
    if plans.is_resumed(sweep) or plans.is_repeated(sweep, argv):
        return
    if sweeper.get("_target_") == PLAN_SWEEPER:
        rule = "runs the jobs of a plan, and this command has none"
        remedy = "Leave it out; a command that makes a plan takes launcher=NAME: blockwright ablate, ladder, transfer"
        raise ConfigError("hydra/sweeper", "plan", rule, remedy)
    if str(sweeper.get("_target_")).startswith("hydra_plugins.hydra_optuna_sweeper."):
        rule = "is of the package hydra-optuna-sweeper, which is installed too, and runs cannot be resumed with it"
        raise ConfigError("hydra/sweeper", "optuna", rule, "Write hydra/sweeper=blockwright_optuna")
    if OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"] != SUBDIR:  # type: ignore[index,call-overload]
        rule = "job N of a sweep is in folder N, where its table and resuming look for it"
        raise ConfigError("hydra.sweep.subdir", config.hydra.sweep.subdir, rule, "Leave it out")
    if (sweep / plans.PLAN).exists() and any(p.name.isdigit() for p in sweep.iterdir()):
        rule = "holds a sweep already"
        remedy = f"Resume it: blockwright sweep resume {sweep}; or name another folder"
        raise ConfigError("hydra.sweep.dir", str(sweep), rule, remedy)
    for key in ("task_name", "optimized_metric"):  # of all jobs, and of the plan
        checked(config[key], HINTS[key], key)
    is_grid = str(sweeper.get("_target_")).endswith(".BasicSweeper")
    plan: dict[str, Any] = {
        "kind": "grid" if is_grid else "search",
        "name": config.task_name,
        "command": shlex.join(["blockwright", "train", *arguments]),
        "metric": config.optimized_metric,
        "workers": workers_of(config),
        "flags": [*flags, *kept(given["hydra"])],
    }
    asked = ("hydra.sweeper.direction", sweeper.get("direction"))
    if is_grid:
        plan["jobs"] = grid_of(sweeper, given["task"])
        first = composed(config, plan["jobs"][0]["overrides"]) if plan["jobs"] else config
        plan["direction"] = figures.check_composed(first)
    else:
        plan["direction"] = figures.check_composed(composed(config, first_of(sweeper, given["task"])), asked)
        plan |= {"argv": argv, "sweeper": sweeper.get("_target_"), "n_trials": sweeper.get("n_trials")}
    if host := host_of(config.hydra.launcher):
        plan |= {"argv": argv, **seams.begin_on(host, config.hydra.launcher)}
    if sweeper.get("_target_") == SWEEPER:
        raw = OmegaConf.to_container(sweeper, resolve=False)
        name = sweeper.get("study_name") or f"{config.task_name}-{sweep.name}"
        plan["study"] = {"name": name, "storage": raw.get("storage")}  # type: ignore[union-attr]
    plans.write(sweep, plan)


def composed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the first job, from which the direction of all follows; the other jobs check themselves.

    Args:
        config: of the multirun, which stands for a job that cannot be composed: that becomes a failed row
        overrides: of the job
    """
    try:
        return GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    except Exception:
        return config


def first_of(sweeper: DictConfig, overrides: list[str]) -> list[str]:
    """The overrides of a search with the first value of each that is searched; none where its syntax is another."""
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        read = parser.parse_overrides([*given, *overrides])
        return [f"{each.key_or_group}={_first(each)}" for each in read]
    except Exception:  # another sweeper's, or a mistake that the search refuses
        return []


def _first(override: Override) -> Any:
    if not override.is_sweep_override():
        return override.get_value_element_as_str()
    value = override.value()
    return value.start if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())


def grid_of(sweeper: DictConfig, overrides: list[str]) -> list[dict[str, Any]]:
    """The jobs that Hydra's own sweeper makes of its parameters and the command line, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    batches = BasicSweeper.split_arguments(parser.parse_overrides([*given, *overrides]), sweeper.get("max_batch_size"))
    jobs = [list(overrides) for batch in batches for overrides in batch]
    return [{"job": i, "overrides": overrides} for i, overrides in enumerate(jobs)]


def workers_of(config: DictConfig) -> int:
    """Parallel jobs under the launcher: joblib's, or a search's ``n_jobs``; -1 is one job per core."""
    launcher, sweeper = config.hydra.launcher, config.hydra.sweeper
    if str(launcher.get("_target_")).endswith(".BasicLauncher"):
        return 1
    asked = launcher.get("n_jobs") or launcher.get("parallel") or sweeper.get("n_jobs") or 1
    if asked < 0:
        return max(1, (os.cpu_count() or 1) + 1 + asked)
    return min(asked, sweeper.get("n_jobs") or asked)
