"""Checks of a run before a directory is written or a tensor allocated; those of the model before Lightning is imported.

No check changes the run, so their order is that of their cost.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from blockwright.blocks.kernels.choice import check as check_kernels
from blockwright.registry import ConfigError
from blockwright.registry.errors import has_package
from blockwright.training.configuration import figures, parts, trainer_settings
from blockwright.training.configuration.instantiate import check_target, find_target, instantiate
from blockwright.training.configuration.run import GROUPS, OWN, Run
from blockwright.training.entry.parse import parse
from blockwright.training.entry.start import check_sources, compare_start, outline_of, recipe_of, refuse_untrained
from blockwright.training.optimizers.recipe import trained
from blockwright.training.parallel.refusals import check as check_ranks
from blockwright.training.parallel.refusals import no_shards
from blockwright.training.parallel.sizes import STRATEGY
from blockwright.training.processes import is_first

if TYPE_CHECKING:
    from blockwright.training.data.modules.batches import DataModule

# --- refuse the callbacks and loggers of conf/ whose extras are not installed, before importing them ---


NEEDS = {  # class → extra, packages of which it needs one
    "lightning.pytorch.loggers.TensorBoardLogger": ("tensorboard", ("tensorboard", "tensorboardX")),
    "lightning.pytorch.loggers.WandbLogger": ("wandb", ("wandb",)),
    "lightning.pytorch.loggers.MLFlowLogger": ("mlflow", ("mlflow", "mlflow_skinny")),
}


def refuse_absent_packages(plain: Mapping[str, Any]) -> None:
    """Refuse callbacks and loggers without their packages, in one message.

    Args:
        plain: a configuration

    Raises:
        ConfigError: with the extras to install
    """
    lacking: dict[str, tuple[str, str, str]] = {}
    for part in ("callbacks", "logger"):
        for name, node in plain[part].items():
            target = node.get("_target_") if isinstance(node, Mapping) else None
            extra, packages = NEEDS.get(str(target), ("", ()))
            if extra and not any(map(has_package, packages)):
                lacking[f"{part}.{name}"] = (str(target), extra, packages[0])
    if lacking:
        targets, extras, packages = zip(*lacking.values(), strict=True)
        rule = f"needs a package that is not installed ({', '.join(packages)})"
        leave = " ".join(f"{path}=null" for path in lacking)
        remedy = f"pip install 'blockwright[{','.join(extras)}]', or leave it out: {leave}"
        raise ConfigError(" and ".join(lacking), ", ".join(targets), rule, remedy)


def prepare(cfg: DictConfig, compared: bool = False) -> Run:
    """Parse and check the run of either command line, which is executed next; note the figures that it lacks.

    Args:
        cfg: as composed
        compared: whether runs are compared by ``optimized_metric``

    Raises:
        ConfigError: with the path, the value, the rule and the remedy
    """
    run = preflight(cfg, compared)
    if is_first():
        for note in filter(None, (figures.left_out(run), *parts.parametrisation(run).notes())):
            print(note, file=sys.stderr)
    refuse_untrained(run)
    from blockwright.training.entry.room import check_room  # DTensor takes a second: after what is refused more often

    check_room(run)
    return run


def preflight(cfg: DictConfig, compared: bool = False) -> Run:
    """Parse and check a run. Arguments and errors are those of ``prepare``."""
    run = parse(cfg)
    check(run, compared)
    check_sources(run)
    return run


def check(run: Run, compared: bool = False) -> None:
    """Check the settings of a run alone, without checkpoints or the run's folders.

    Args:
        run: as parsed
        compared: as of ``prepare``

    Raises:
        ConfigError: with the path, the value, the rule and the remedy
    """
    refuse_absent_packages(run)
    compare_start(run)
    check_kernels(run.task.get("kernels") or {}, "task.kernels")
    trainer_settings.check(run.trainer, run.train)
    check_ranks(run)
    if run.trainer.get("compile") is True:
        check_compiler(str(run.trainer.get("accelerator")))
    _check_optimizer(run)
    _check_parts(run)
    figures.check(run, compared)


def check_compiler(accelerator: str) -> None:
    """Refuse to compile for a CPU without a C++ compiler; a GPU's kernels are Triton's.

    Raises:
        ConfigError
    """
    known = ("g++", "clang++", "c++")
    if accelerator == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", *known))):
        rule = f"needs a C++ compiler, and none of {', '.join(known)} is found"
        raise ConfigError("trainer.compile", True, rule, "Install one, or write trainer.compile=false")


def _check_optimizer(run: Run) -> None:
    check_target(run.optimizer, "optimizer")
    recipe = recipe_of(run)
    is_frozen = run.task.get("frozen") not in (None, [])
    if is_frozen or any(recipe.patterns().values()) or recipe.scales or parts.starts(run):
        recipe.check(trained(outline_of(run)))  # patterns match some parameter, on the meta device
    check_target(run.scheduler, "scheduler")
    schedule = instantiate(run.scheduler, "scheduler")
    steps = run.trainer.get("max_steps", -1)
    counts_epochs = run.trainer.get("max_epochs") not in (None, -1)
    if isinstance(steps, int) and run.train and not (steps == -1 and counts_epochs):
        schedule.check(steps)


def _check_parts(run: Run) -> None:
    """Check the trainer, callbacks, loggers, the data and the task, whose classes import Lightning."""
    for part in ("trainer", *GROUPS):
        check_target(run[part], part, skip=OWN)
    _check_sharded(run)
    data = parts.build("data", run)
    data.check()
    if run.train and not run.trainer.get("fast_dev_run"):
        data.check_run(trainer_settings.batches_of(run.trainer))
    _check_fit(run.model, data)
    parts.check("task", run)


def _check_sharded(run: Run) -> None:
    """Refuse a callback whose class needs all weights on each process (``whole``), where ranks share them."""
    strategy = run.trainer.get("strategy")
    if not isinstance(strategy, Mapping) or strategy.get("_target_") != STRATEGY:
        return
    for name, node in run.callbacks.items():
        if node and getattr(find_target(node["_target_"], f"callbacks.{name}"), "whole", False):
            raise no_shards(f"callbacks.{name}", node["_target_"])


def _check_fit(model: Mapping[str, Any], data: DataModule) -> None:
    """Check that the model fits the data."""
    vocabulary = 0 if data.tokenizer is None else data.tokenizer.vocab_size
    if model["vocab_size"] < vocabulary:
        rule = f"must hold the tokenizer's vocabulary (data.tokenizer.vocab_size = {vocabulary})"
        remedy = "Raise it, or leave it at ${data.tokenizer.vocab_size}"
        raise ConfigError("model.vocab_size", model["vocab_size"], rule, remedy)
    length = getattr(data, "sequence_length", None)
    if isinstance(length, int) and length > model["max_positions"]:
        rule = f"is longer than the model's positions (model.max_positions = {model['max_positions']})"
        raise ConfigError("data.sequence_length", length, rule, "Shorten it, or raise model.max_positions")
    if (needed := data.positions) > model["max_positions"]:
        rule = f"reaches beyond the model's positions (model.max_positions = {model['max_positions']})"
        remedy = f"Raise model.max_positions to {needed}, or lower the target"
        raise ConfigError("data.transforms", needed, rule, remedy)
    depth = (model["mtp"] or {"depth": 0})["depth"]
    if isinstance(length, int) and 0 < length <= depth:
        rule = f"predicts tokens beyond the sequence (data.sequence_length = {length})"
        raise ConfigError("model.mtp.depth", depth, rule, "Predict fewer tokens, or lengthen it")
