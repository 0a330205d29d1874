"""Judge completions by a reward that may fail: a failure is counted, is one completion's, and does not end a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blocks.precision import without_autocast
from training.objectives.reward.base import Reward
from training.time_limit import Overdue, time_limit


@dataclass(frozen=True)
class Failure:
    """In place of a reward: why there is none."""

    reason: str


Judged = list[float | Failure]  # NaN where the reward has no opinion


def judge(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, list[float]], int]:
    """Each part's rewards, NaN for none, and how many are missing because the part failed.

    It fails where it raises, takes longer than its ``timeout_s``, gives another number of values, or a value that is no
    finite number within its ``bounds``. All finite rewards of a run come from here.

    Args:
        reward: to judge by
        prompts: one a completion
        completions: their texts
        columns: of the data, one value a completion
    """
    found: dict[str, list[float]] = {}
    failed = 0
    for name, (_, part) in reward.parts().items():
        values = _judge(part, prompts, completions, columns)
        reasons = [value.reason for value in values if isinstance(value, Failure)]
        if reasons:
            of = f"{len(reasons)} of {len(values)} completions"
            warnings.warn(f"the reward {name} failed for {of}: {reasons[0]}", stacklevel=2)
        failed += len(reasons)
        found[name] = [math.nan if isinstance(value, Failure) else value for value in values]
    return found, failed


def _judge(
    part: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> Judged:
    """All completions at once; each by itself, within the same time for all, where that raises."""
    size = len(completions)
    try:
        return _called(part, prompts, completions, columns, part.timeout_s)
    except (Exception, Overdue) as error:  # a plug-in's reward may fail in any way
        if part.together or size == 1:
            return [_raised(error)] * size
    found: Judged = []
    for i in range(size):
        own = {name: [values[i]] for name, values in columns.items()}
        try:
            found += _called(part, [prompts[i]], [completions[i]], own, part.timeout_s / size)
        except (Exception, Overdue) as error:
            found.append(_raised(error))
    return found


def _raised(error: BaseException) -> Failure:
    return Failure(f"{type(error).__name__}: {error}"[:300])


def _called(
    part: Reward,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    seconds: float,
) -> Judged:
    with time_limit(seconds), without_autocast():  # a reward is no part of the model
        values = list(part(prompts, completions, **columns))
    if len(values) != len(completions):
        return [Failure(f"gave {len(values)} values for {len(completions)} completions")] * len(completions)
    return [_number(value, *part.bounds) for value in values]


def _number(value: Any, low: float, high: float) -> float | Failure:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return Failure(f"gave a {type(value).__name__} that is no finite number")
    if not low <= number <= high:
        return Failure(f"gave {number:g}, which is not within its bounds, {low:g} to {high:g}")
    return number
