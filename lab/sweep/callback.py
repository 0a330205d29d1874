"""What Hydra's multirun leaves beside its jobs: the plan before the first, a line after each, the table at the end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lab.sweep import locks
from lab.sweep import plan as plans
from lab.sweep.progress import ended_line
from lab.sweep.table import summarise
from registry import REFUSED, ConfigError

CONFIG_FLAGS = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")


class SweepCallback(Callback):
    """Hydra callback of a multirun: writes ``plan.json``, tells of each job, ends with ``summary.csv``.

    It holds the sweep's lock while the multirun lives, and each job holds its own, wherever a launcher runs it.
    """

    def __init__(self) -> None:
        self._locks: list[int] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir).absolute()
        try:
            begin(sweep, config, sys.argv[1:])
            self._locks.append(locks.take_sweep(sweep))
        except ConfigError as error:  # Hydra makes a warning of any Exception of a callback
            print(error.render(), file=sys.stderr)
            raise SystemExit(REFUSED) from None

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        if (folder.parent / plans.PLAN).exists():
            held = locks.take(folder)  # None: this is another rank of the job, whose first has it
            self._locks += [] if held is None else [held]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        if config.hydra.mode != RunMode.MULTIRUN or not (folder.parent / plans.PLAN).exists():
            return
        plan = plans.read(folder.parent)
        value = job_return._return_value
        if plans.results_of(folder) is None and isinstance(value, int | float):  # a run without callbacks.report
            metrics = {plan["metric"]: float(value)}
            plans.write_json(folder / plans.RESULTS, {"status": "completed", "metrics": metrics})
        print(ended_line(folder.parent, plan, int(folder.name), plan["workers"]), flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        summarise(Path(config.hydra.sweep.dir))


def begin(sweep: Path, config: DictConfig, arguments: list[str]) -> None:
    """Write the plan of a multirun.

    Args:
        sweep: its folder
        config: as composed, ``hydra`` included
        arguments: the process's

    Raises:
        ConfigError: the folder holds another sweep
    """
    sweeper = config.hydra.sweeper
    if sweeper.get("resume"):
        return
    if (sweep / plans.PLAN).exists():
        rule = "holds a sweep already"
        remedy = f"Go on with it: python -m lab.sweep resume {sweep}; or name another folder"
        raise ConfigError("hydra.sweep.dir", str(sweep), rule, remedy)
    is_grid = str(sweeper.get("_target_")).endswith(".BasicSweeper")
    searched = {} if is_grid else {"argv": arguments, "n_trials": sweeper.get("n_trials")}
    plan: dict[str, Any] = {
        "kind": "grid" if is_grid else "search",
        "name": config.task_name,
        "command": shlex.join(["python", "train.py", *arguments]),
        "metric": config.optimized_metric,
        "direction": direction_of(sweeper),
        "workers": workers_of(config),
        "flags": [*config_flags(arguments), *kept(config.hydra.overrides.hydra)],
        **searched,
    }
    if is_grid:
        plan["jobs"] = grid_of(sweeper, list(config.hydra.overrides.task))
    plans.write(sweep, plan)


def grid_of(sweeper: DictConfig, overrides: list[str]) -> list[dict[str, Any]]:
    """The jobs that Hydra's own sweeper makes of its parameters and the command line, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    batches = BasicSweeper.split_arguments(parser.parse_overrides([*given, *overrides]), sweeper.get("max_batch_size"))
    jobs = [list(overrides) for batch in batches for overrides in batch]
    return [{"job": i, "overrides": overrides} for i, overrides in enumerate(jobs)]


def direction_of(sweeper: Mapping[str, Any]) -> str:
    """``minimize`` or ``maximize``; a grid minimizes."""
    return "maximize" if "maximize" in str(sweeper.get("direction", "minimize")) else "minimize"


def workers_of(config: DictConfig) -> int:
    """Jobs at a time under the launcher: those of joblib and of a search's ``n_jobs``; -1 is a job for each core."""
    launcher, sweeper = config.hydra.launcher, config.hydra.sweeper
    if str(launcher.get("_target_")).endswith(".BasicLauncher"):
        return 1
    asked = OmegaConf.select(launcher, "n_jobs") or sweeper.get("n_jobs") or 1
    if asked < 0:
        return max(1, (os.cpu_count() or 1) + 1 + asked)
    return min(asked, sweeper.get("n_jobs") or asked)


def config_flags(arguments: list[str]) -> list[str]:
    """Those of Hydra's options that say where its configuration is."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        if argument in CONFIG_FLAGS:
            found += arguments[i : i + 2]
        elif argument.startswith(tuple(f"{flag}=" for flag in CONFIG_FLAGS)):
            found.append(argument)
    return found


def kept(overrides: list[str]) -> list[str]:
    """Those overrides of Hydra's own configuration that a job needs when it runs by itself."""
    return [o for o in overrides if o.lstrip("+").startswith("hydra.searchpath")]
