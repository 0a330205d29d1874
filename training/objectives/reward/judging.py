"""Judge completions by a reward that may fail: a failure is counted, is one completion's, and does not end a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from blockwright.blocks.precision import without_autocast
from blockwright.training.objectives.reward.base import Reward
from blockwright.training.time_limit import Overdue, time_limit


@dataclass(frozen=True)
class Failure:
    """In place of a reward: why there is none."""

    reason: str


Judged = list[float | Failure]  # NaN where the reward has no opinion


def judge(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, list[float]], int]:
    """Each part's rewards, NaN for none, and how many are missing because the part failed.

    A part fails where it raises, takes longer than ``timeout_s``, gives another number of values, or a value that is
    no finite number within its ``bounds``. All finite rewards of a run come from here.

    A completion of which a part fails has no reward from any part: its sum without a failed penalty would be higher
    than that of a completion that was judged.

    Args:
        reward: to judge by
        prompts: one a completion
        completions: their texts
        columns: of the data, one value a completion
    """
    each = {name: _judge(part, prompts, completions, columns) for name, (_, part) in reward.parts().items()}
    found = {name: [math.nan if isinstance(value, Failure) else value for value in row] for name, row in each.items()}
    failed = 0
    for name, row in each.items():
        failures = {i: value.reason for i, value in enumerate(row) if isinstance(value, Failure)}
        if failures:
            of = f"{len(failures)} of {len(row)} completions"
            warnings.warn(f"the reward {name} failed for {of}: {next(iter(failures.values()))}", stacklevel=2)
        failed += len(failures)
        for values, i in product(found.values(), failures):
            values[i] = math.nan
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
