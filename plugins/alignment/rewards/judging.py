"""Judge completions by a reward that may fail: a failure costs one completion, is counted, and does not end a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockwright.blocks.precision import without_autocast
from blockwright.plugins.alignment.rewards.base import Column, Reward, Texts
from blockwright.training.answering import Overdue, time_limit


@dataclass(frozen=True)
class Failure:
    """The reason why a completion has no reward."""

    reason: str


Judged = list[float | Failure]  # NaN where the reward has no opinion


def judge(
    reward: Reward, prompts: Texts, completions: Texts, columns: Mapping[str, Column]
) -> tuple[dict[str, list[float]], list[int]]:
    """The rewards of each part, NaN for none, and how many parts failed for each completion.

    A part fails where it raises, takes longer than ``timeout_s``, gives another number of values, or a value that is
    no finite number within its ``bounds``. All finite rewards of a run come from this function.

    A completion that a part fails to judge has no reward from any part: its sum without a failed penalty would be
    higher than that of a completion that was judged.

    Args:
        reward: to judge by
        prompts: one a completion
        completions: the text of each
        columns: of the data, one value a completion
    """
    judged = {name: _judge(part, prompts, completions, columns) for name, (_, part) in reward.parts().items()}
    for name, row in judged.items():
        _warn_of_failures(name, row)
    failed = [sum(isinstance(value, Failure) for value in found) for found in zip(*judged.values(), strict=True)]
    return {name: _without(failed, row) for name, row in judged.items()}, failed


def _warn_of_failures(part: str, judged: Judged) -> None:
    reasons = [value.reason for value in judged if isinstance(value, Failure)]
    if reasons:
        share = f"{len(reasons)} of {len(judged)} completions"
        warnings.warn(f"the reward {part} failed for {share}: {reasons[0]}", stacklevel=3)


def _without(failed: list[int], judged: Judged) -> list[float]:
    """The rewards, NaN for failed completions."""
    return [math.nan if isinstance(value, Failure) or n else value for value, n in zip(judged, failed, strict=True)]


def _judge(part: Reward, prompts: Texts, completions: Texts, columns: Mapping[str, Column]) -> Judged:
    """Judge all completions at once; if that raises, each by itself, within as much time for all of them."""
    size = len(completions)
    try:
        return _called(part, prompts, completions, columns, part.timeout_s)
    except (Exception, Overdue) as error:  # a plug-in's reward may fail in any way
        if part.together or size == 1:
            return [_raised(error)] * size
    judged: Judged = []
    for i in range(size):
        row = {name: [values[i]] for name, values in columns.items()}
        try:
            judged += _called(part, [prompts[i]], [completions[i]], row, part.timeout_s / size)
        except (Exception, Overdue) as error:
            judged.append(_raised(error))
    return judged


def _raised(error: BaseException) -> Failure:
    return Failure(f"{type(error).__name__}: {error}"[:300])


def _called(part: Reward, prompts: Texts, completions: Texts, columns: Mapping[str, Column], seconds: float) -> Judged:
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
