"""Check and run one job composed by Hydra, and report how it ended."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from blockwright import registry
from blockwright.registry import ConfigError, presets
from blockwright.registry.folder import read_json
from blockwright.training.checkpoints.find import LAST
from blockwright.training.checkpoints.places import SWEEP, place_of
from blockwright.training.claims import only_writer
from blockwright.training.configuration import config_tree, figures
from blockwright.training.configuration.refusals import refuse_empty
from blockwright.training.configuration.secrets import hidden, read_from_environment
from blockwright.training.entry.preflight import preflight
from blockwright.training.entry.ranks import LAUNCHED, is_child, overrides, pin_children, reset_processes
from blockwright.training.entry.start import refuse_untrained
from blockwright.training.jobs import HOST, host_of, release
from blockwright.training.result import Result, record_failure
from blockwright.training.stops import Diverged, Interrupted, Pruned

refused: list[ConfigError] = []  # by this process's job; Hydra would print a traceback of an exception


def hydra_job(cfg: DictConfig) -> float | None:
    """Run one job. In a sweep a failure becomes a row of the table with the worst value, and the sweep continues."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    directory = Path(HydraConfig.get().runtime.output_dir)
    value, found = _worst(directory), None
    try:
        if sweeping or is_child() or (directory.parent / SWEEP).is_file():  # a sweep locks its jobs itself
            return _job(cfg, directory, sweeping)
        with only_writer(directory) as alone:
            if not alone:
                rule = "is the folder of a run that is still running, whose files this one would overwrite"
                raise ConfigError("hydra.run.dir", str(directory), rule, "Wait for it, or name another hydra.run.dir")
            return _job(cfg, directory, sweeping)
    except Interrupted:
        release(directory)
        raise
    except ConfigError as error:
        if not sweeping:
            refused.append(error)
            return None
        status, reason = "failed", str(error)
    except Diverged as error:
        if not sweeping:
            raise
        status, reason = "diverged", str(error)
    except Pruned as stop:
        if not sweeping:
            raise
        status, reason, value, found = "pruned", str(stop), stop.value, {stop.monitor: stop.value}
    except Exception as error:
        if not sweeping:
            raise
        status, reason = "failed", f"{type(error).__name__}: {error}"
    record_failure(directory, reason, status, found)
    return value


def _job(cfg: DictConfig, directory: Path, sweeping: bool) -> float | None:
    refuse_empty(cfg, overrides())
    if host_of(HydraConfig.get().launcher) and HOST not in os.environ:  # Hydra would ignore it
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        rule = "starts the jobs of a multirun, and this is a single run"
        raise ConfigError("hydra/launcher", launcher, rule, "Add -m")
    plain = preflight(cfg, compared=sweeping)
    if (plan := _plan(directory)).get("metric") == cfg.optimized_metric:
        figures.direction(plain, (f"direction of {directory.parent / SWEEP}", plan.get("direction")))
    if (note := figures.left_out(plain)) and not is_child():
        print(note, file=sys.stderr)
    from blockwright.training.entry import cli
    from blockwright.training.entry.room import check_room
    from blockwright.training.entry.run import run

    refuse_untrained(plain)
    check_room(plain)
    shown = hidden(plain, read_from_environment(cfg))
    if not is_child():
        cli.export(shown, directory)
    arguments = pin_children(directory, plain["ckpt_path"])
    before = {name: os.environ.get(name) for name in LAUNCHED}
    try:
        printed = plain["extras"]["print_config"] and not is_child()
        metrics = run(plain, shown, lambda: config_tree.show(shown, directory, printed))
    finally:
        reset_processes(before)
    if plain["trainer"].get("dry_run"):
        return 0.0
    in_sweep = sweeping or (directory.parent / SWEEP).is_file()
    if in_sweep and not is_child() and not Result.read(directory).ended:  # without callbacks.report
        declared = {name: of for name in metrics if (of := figures.declaration(name, plain)) is not None}
        Result("completed", metrics=metrics, figures=declared).write(directory)
    last = place_of(plain).checkpoints / LAST
    if last.exists() and not is_child():
        print(f"Continue: {_continuation(arguments, plain['trainer'].get('max_steps', -1), last)}")
    value = metrics.get(cfg.optimized_metric)
    if value is None:
        known = registry.did_you_mean(cfg.optimized_metric, metrics)
        missing = ConfigError("optimized_metric", cfg.optimized_metric, "no such value was logged", known)
        if sweeping:
            raise missing
        if cfg.optimized_metric not in (note or "") and not is_child():  # the training counts anyway
            print(f"warning: {missing}", file=sys.stderr)
        return None
    return value if math.isfinite(value) else _worst(directory)


def _continuation(arguments: list[str], steps: int, checkpoint: Path) -> str:
    """The command that trains on from a finished run, for twice its steps."""
    kept = [o for o in arguments if not o.startswith(("ckpt_path=", "trainer.max_steps="))]
    longer = [f"trainer.max_steps={2 * steps}"] if steps > 0 else []
    folders = [f"{presets.VARIABLE}={value}" for value in [os.environ.get(presets.VARIABLE)] if value]
    return shlex.join([*folders, "blockwright", "train", *kept, *longer, f"ckpt_path={checkpoint}"])


def _plan(directory: Path) -> dict[str, Any]:
    """The plan of the sweep that a job is one of; empty for a run alone."""
    try:
        plan = read_json(directory.parent, SWEEP)
    except ConfigError:
        return {}
    return plan if isinstance(plan, dict) else {}


def _worst(directory: Path) -> float:
    """The value of a failed or diverged job for a sweeper; some do not support NaN."""
    return -math.inf if _plan(directory).get("direction") == "maximize" else math.inf
