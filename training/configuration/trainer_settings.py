"""Settings of Lightning's Trainer that it accepts and then fails on, or that are misleading.

Types and names of arguments are checked against the Trainer's signature (instantiate.py); here are ranges and names of
values, which it does not declare, so that a mistake is a message and not a traceback.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from blockwright.registry import ConfigError, did_you_mean
from blockwright.training.configuration.root import check_value


class Least(NamedTuple):
    """The minimum of a number, and its meaning."""

    value: int
    rule: str


LEAST = {
    "accumulate_grad_batches": Least(1, "counts batches, and a step needs one"),
    "check_val_every_n_epoch": Least(1, "counts epochs between validations; null counts steps instead"),
    "fast_dev_run": Least(0, "counts batches; 0 is an ordinary run"),
    "gradient_clip_val": Least(0, "is the norm to which gradients are clipped; below 0 it would invert them"),
    "log_every_n_steps": Least(0, "counts steps; 0 never logs"),
    "max_epochs": Least(-1, "counts epochs; -1 leaves the end to trainer.max_steps"),
    "max_steps": Least(-1, "counts optimizer steps; -1 leaves the end to trainer.max_epochs"),
    "min_epochs": Least(0, "counts epochs"),
    "min_steps": Least(0, "counts optimizer steps"),
    "num_nodes": Least(1, "counts machines"),
    "num_sanity_val_steps": Least(-1, "counts batches; -1 means all"),
    "reload_dataloaders_every_n_epochs": Least(0, "counts epochs; 0 never reloads"),
}
SWITCHES = ("compile", "dry_run")  # this project's own; Lightning's are checked by its signature
GROUPS = ("callbacks", "logger")  # arguments of the Trainer that are groups of their own here
SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
CHOICES = {
    "accelerator": ("auto", "cpu", "cuda", "gpu", "hpu", "mps", "tpu"),
    "gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("advanced", "pytorch", "simple", "xla"),
}
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
    for key in SWITCHES:
        check_value(f"trainer.{key}", trainer.get(key, False), bool)
    for key, (least, rule) in LEAST.items():
        value = trainer.get(key)
        if _is_number(value) and not least <= value < math.inf:
            raise ConfigError(f"trainer.{key}", value, rule, f"Write trainer.{key}={least} or more")
    for key in SHARES:
        value = trainer.get(key)
        if _is_number(value) and not (0 <= value <= 1 or (value > 1 and value % 1 == 0)):
            rule = "must be a fraction of the batches from 0 to 1, or a number of them"
            raise ConfigError(f"trainer.{key}", value, rule, f"Write trainer.{key}=0.5 or trainer.{key}=10")
    for key, known in CHOICES.items():
        value = trainer.get(key)
        if isinstance(value, str) and value.lower() not in known:
            raise ConfigError(f"trainer.{key}", value, "there is no such choice", did_you_mean(value, known))
    _check_interval(trainer)
    _check_time(trainer)
    _check_devices(trainer.get("devices", "auto"))
    _check_strategy(trainer)
    for key in ("max_steps", "max_epochs", "limit_train_batches", "max_time") if train else ():
        if _is_number(trainer.get(key)) and trainer[key] == 0:
            raise ConfigError(f"trainer.{key}", trainer[key], "trains nothing", "To measure only, write train=false")


def log_short_runs(trainer: dict[str, Any]) -> None:
    """Make a run with fewer steps than ``log_every_n_steps`` log its last one, so that it has a curve and a speed."""
    every, steps = trainer.get("log_every_n_steps"), trainer.get("max_steps", -1)
    if _is_number(every) and _is_number(steps) and 0 < steps < every:
        trainer["log_every_n_steps"] = steps


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
    given = [part.strip() for part in devices.split(",") if part.strip()] if isinstance(devices, str) else devices
    if devices in ("auto", -1, "-1") or (isinstance(devices, str) and devices.isdigit() and int(devices) > 0):
        return
    if isinstance(given, list):
        numbers = [str(one) for one in given]
        named = "," in devices if isinstance(devices, str) else True
        if named and numbers and all(n.isdigit() for n in numbers) and len({int(n) for n in numbers}) == len(numbers):
            return
    elif isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
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
