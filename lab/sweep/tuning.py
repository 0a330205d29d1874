"""The stage of a plan that tunes a setting for each arm: values in octaves, then two more for all while one needs them.

The designs of ablations, ladders and transfers share it. The stage runs one seed, which is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.tuning import Try
from blockwright.registry import ConfigError
from blockwright.training.result import Result

TUNE, COMPARE = "tune", "compare"  # stages of a plan
RATE = "optimizer.lr"
Arm = TypeVar("Arm", bound=Hashable)
SD_OF_RUN = 0.007  # nats, of a small model of text, where no measured noise is at hand


@dataclass(frozen=True)
class Aim:
    """The figure by which tries are judged.

    Args:
        metric: its name
        direction: in which it is better
    """

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def maximize(self) -> bool:
        return self.direction == "maximize"

    def loss(self, result: Result) -> float:
        """The figure of a run as a loss; infinite for a run that was lost."""
        return loss_of(result.value(self.metric), self.maximize)


def octaves(value: float, number: int) -> list[float]:
    """So many values an octave apart, around the composed one."""
    return [value * 2.0 ** (i - number // 2) for i in range(number)]


def next_round(tried: Mapping[Arm, Sequence[Try]], first: int, rounds: int, sd_of_run: float) -> dict[Arm, list[float]]:
    """Two more values for every arm, so that all have as many tries; empty if no arm needs them, or rounds are over.

    Args:
        tried: arm → its tries
        first: number of tries before the first round
        rounds: at most; the best of an arm may then still be at an edge
        sd_of_run: standard deviation of a run, in the unit of the losses
    """
    done = (max(map(len, tried.values())) - first) // 2
    if done >= rounds or not any(tuning.next_tries(tries, sd_of_run) for tries in tried.values()):
        return {}
    return {arm: tuning.further(tries) for arm, tries in tried.items()}


def composed_value(settings: Any, path: str, arm: str) -> float:
    """The composed value of a setting, around which it is tuned.

    Args:
        settings: the configuration of an arm
        path: of the setting
        arm: name, for the message

    Raises:
        ConfigError: it is not a positive number
    """
    value = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        rule = f"is tuned in octaves around its composed value, a positive number, but arm {arm} has {value!r} there"
        raise ConfigError(f"tune.{path}", arm, rule, "Write the path of a number, or tune=null")
    return float(value)


def loss_of(value: float | None, maximize: bool = False) -> float:
    """A figure as a loss: less is better, and nothing is worse than none."""
    return math.inf if value is None else -value if maximize else value
