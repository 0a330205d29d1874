"""Judge completions by a reward that may fail: a failure is counted, and is not the end of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from training.objectives.reward.base import Reward
from training.time_limit import Overdue, time_limit


def judge(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, list[float]], int]:
    """Each part's rewards, NaN for none, and how many parts failed: raised, took longer than its ``timeout_s``, or
    gave another number of values, or what is no number.

    Args:
        reward: to judge by
        prompts: one a completion
        completions: their texts
        columns: of the data, one value a completion
    """
    found: dict[str, list[float]] = {}
    failed = 0
    for name, (_, part) in reward.parts().items():
        try:
            with time_limit(part.timeout_s):
                values = part(prompts, completions, **columns)
            if len(values) != len(completions):
                raise ValueError(f"gave {len(values)} values for {len(completions)} completions")
            found[name] = [_number(value) for value in values]
        except (Exception, Overdue) as error:  # a plug-in's reward may fail in any way
            failed += 1
            warnings.warn(f"the reward {name} failed: {type(error).__name__}: {error}", stacklevel=2)
            found[name] = [math.nan] * len(completions)
    return found, failed


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)
