"""``optimizer.lr=last``: start at the learning rate at which the training of the weights has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import Past

LAST = "last"


def last_rate(optimizer: Mapping[str, Any], past: Past | None) -> float:
    """The last learning rate of the run that weights come from, as a peak for this one.

    DeepSeek-V3 (arXiv 2412.19437, §4.3) extends its context at the last rate of pre-training, held constant
    (scheduler=constant); a warm-up to the old peak would undo what the decay has settled.

    Args:
        optimizer: the ``optimizer`` node, of which the class is compared: rates of different optimizers are not alike
        past: of the run; None where the weights come from none

    Raises:
        ConfigError: at ``optimizer.lr``: the weights come from no run, its rate is not recorded, or its optimizer was
            another
    """
    remedy = "Write the learning rate as a number"
    if past is None:
        rule = "is the rate at which the run that init_from names has ended, but it names no run"
        raise ConfigError("optimizer.lr", LAST, rule, remedy)
    old = past.settings.get("optimizer") or {}
    if past.rate is None or not isinstance(old.get("lr"), int | float):
        raise ConfigError("optimizer.lr", LAST, "is not recorded in the checkpoint that init_from names", remedy)
    if old.get("_target_") != optimizer.get("_target_"):
        rule = f"is of another optimizer: {old.get('_target_')} there, {optimizer.get('_target_')} here"
        raise ConfigError("optimizer.lr", LAST, rule, "Choose the run's optimizer, or write the learning rate")
    return float(old["lr"]) * past.rate
