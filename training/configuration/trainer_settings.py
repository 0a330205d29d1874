"""Settings of Lightning's Trainer that it accepts and then fails on, or that are misleading.

Names and types of all arguments are checked against the Trainer's signature (instantiate.py). It declares neither
ranges nor names of values: ``Ranges`` does, so that a mistake is a message and not a traceback.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, TypeGuard

from annotated_types import Ge

from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.ranges import Count, Fraction, Whole
from blockwright.registry.reading import Remedy, checked
from blockwright.training.configuration.run import GROUPS, Node

Limit = Annotated[int, Ge(-1)]  # -1 for none
Batches = Fraction | Whole | None  # a share of them, or a number
Norm = Annotated[float, Ge(0), Remedy("Write the norm to which gradients are clipped: below 0 it would invert them")]


class Ranges(TypedDict, total=False):
    """Values of the trainer's settings; those that only this project has, too."""

    accelerator: Literal["auto", "cpu", "cuda", "gpu", "hpu", "mps", "tpu"] | Node
    accumulate_grad_batches: Count
    check_val_every_n_epoch: Count | None  # null counts steps between validations instead
    compile: Literal["auto"] | bool
    dry_run: bool
    fast_dev_run: bool | Whole
    gradient_clip_algorithm: Literal["norm", "value"] | None
    gradient_clip_val: Norm | None
    limit_predict_batches: Batches
    limit_test_batches: Batches
    limit_train_batches: Batches
    limit_val_batches: Batches
    log_every_n_steps: Whole | None
    max_epochs: Limit | None
    max_steps: Limit
    min_epochs: Whole | None
    min_steps: Whole | None
    num_nodes: Count
    num_sanity_val_steps: Limit | None
    overfit_batches: Fraction | Whole
    profiler: Literal["advanced", "pytorch", "simple", "xla"] | Node | None
    reload_dataloaders_every_n_epochs: Whole
    world: Count | None


DDP = ("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
STRATEGIES = ("auto", *DDP, "single_device")
TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")


def check(trainer: Mapping[str, Any], train: bool) -> None:
    """Refuse invalid values of the trainer.

    Args:
        trainer: the ``trainer`` node, as plain types
        train: whether the run trains

    Raises:
        ConfigError: at ``trainer.<key>``
    """
    for key in GROUPS:
        if key in trainer:
            rule = f"would be ignored: the Trainer gets what the group {key} builds"
            raise ConfigError(f"trainer.{key}", trainer[key], rule, f"Leave it out, and write {key}=NAME")
    for key, hint in typing.get_type_hints(Ranges, include_extras=True).items():
        if key in trainer:
            checked(trainer[key], hint, f"trainer.{key}")
    _check_interval(trainer)
    _check_time(trainer)
    _check_devices(trainer.get("devices", "auto"))
    _check_strategy(trainer)
    for key in ("max_steps", "max_epochs", "limit_train_batches", "max_time") if train else ():
        if _is_number(trainer.get(key)) and trainer[key] == 0:
            raise ConfigError(f"trainer.{key}", trainer[key], "trains nothing", "To measure only, write train=false")


def batches_of(trainer: Mapping[str, Any]) -> int | None:
    """The micro-batches of a run.

    Args:
        trainer: the ``trainer`` node, as plain types

    Returns:
        their number; None if the run has no number of steps
    """
    steps = trainer.get("max_steps") or -1
    return None if steps < 0 else steps * (trainer.get("accumulate_grad_batches") or 1)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_interval(trainer: Mapping[str, Any]) -> None:
    """Check the interval: steps between validations, a fraction of an epoch if epochs are counted, or a time."""
    value, path = trainer.get("val_check_interval"), "trainer.val_check_interval"
    if not _is_number(value):
        return
    if not 0 < value < math.inf:
        raise ConfigError(path, value, "counts steps between validations", "Write a number of steps, or null for none")
    if isinstance(value, float):
        if trainer.get("check_val_every_n_epoch", 1) is None:
            rule = "is a fraction of an epoch, but steps are counted (trainer.check_val_every_n_epoch is null)"
            raise ConfigError(
                path, value, rule, "Write a number of steps, or trainer.check_val_every_n_epoch=1 as well"
            )
        if value > 1:
            raise ConfigError(path, value, "is a fraction of an epoch, at most 1.0", "Write a whole number for steps")


def _check_time(trainer: Mapping[str, Any]) -> None:
    for key in ("max_time", "val_check_interval"):
        value = trainer.get(key)
        counts = key == "val_check_interval" and _is_number(value)
        if not (value is None or counts or isinstance(value, Mapping) or TIME.fullmatch(str(value))):
            rule = "must be a time as days:hours:minutes:seconds"
            raise ConfigError(f"trainer.{key}", value, rule, f"Write trainer.{key}='00:12:00:00' for twelve hours")


def _check_devices(devices: Any) -> None:
    """Check the number or list of devices: 2, auto, -1, [0, 2] or the same as text."""
    text = ",".join(map(str, devices)) if isinstance(devices, list) else str(devices)
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    distinct = all(map(str.isdecimal, numbers)) and len({*map(int, numbers)}) == len(numbers) > 0
    is_count = not isinstance(devices, list) and "," not in text
    if devices in ("auto", "-1", -1) or (distinct and not (is_count and int(text) == 0)):
        return
    rule = "must be the number of processes, with a device each, or a list of devices"
    raise ConfigError("trainer.devices", devices, rule, "Write a number from 1 on, a list such as [0,1], or auto")


def _check_strategy(trainer: Mapping[str, Any]) -> None:
    """Check Lightning's strategy names; parallel/refusals.py checks what each needs."""
    name, path = trainer.get("strategy", "auto"), "trainer.strategy"
    if (isinstance(name, Mapping) and name) or str(name).startswith(("fsdp", "deepspeed")):
        return
    if str(name).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        rule = "forks its processes from this one, which does not get their weights and figures"
        raise ConfigError(path, name, rule, "Write trainer.strategy=ddp, which starts them as separate commands")
    if name == "model_parallel":
        raise ConfigError(path, name, "needs a plan for each layer", "Write trainer=fsdp_tp, which has them")
    if name not in STRATEGIES:
        known = did_you_mean(name, (*STRATEGIES, "deepspeed", "fsdp"))
        raise ConfigError(path, name, "is not a supported strategy", known)
