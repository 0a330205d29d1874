"""Judge completions by a reward that may fail: a failure costs one completion, is counted, and does not end a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockwright.blocks.precision import without_autocast
from blockwright.plugins.alignment.data.prompt_module import Prompt
from blockwright.plugins.alignment.rewards.rewards import Column, Reward, Texts
from blockwright.plugins.alignment.rollouts.record import Rollout
from blockwright.registry import ConfigError
from blockwright.training.answering import Overdue, time_limit
from blockwright.training.data.tokenizers.tokenizer import Tokenizer


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
        reasons = [value.reason for value in row if isinstance(value, Failure)]
        if reasons:
            share = f"{len(reasons)} of {len(row)} completions"
            warnings.warn(f"the reward {name} failed for {share}: {reasons[0]}", stacklevel=3)
    failed = [sum(isinstance(value, Failure) for value in found) for found in zip(*judged.values(), strict=True)]
    return {name: _without(failed, row) for name, row in judged.items()}, failed


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


# --- judge the completions of a rollout by the columns of their prompts -----------------------------------------------


def judge_rollout(
    reward: Reward, tokenizer: Tokenizer, prompts: Sequence[Prompt], rollout: Rollout
) -> tuple[dict[str, list[float]], list[int]]:
    """Rewards of each part for the completions of a rollout, NaN for none, and how many parts failed for each.

    A reward reads the columns that all prompts have, and ``n_tokens`` and ``ended`` of each completion.

    Args:
        reward: to judge by
        tokenizer: of the completions
        prompts: of each completion
        rollout: what was sampled
    """
    names = set.intersection(*(set(prompt.columns) for prompt in prompts))
    columns: dict[str, list[Any]] = {name: [prompt.columns[name] for prompt in prompts] for name in sorted(names)}
    columns |= {"n_tokens": [len(ids) for ids in rollout.completions], "ended": rollout.ended}
    texts = [tokenizer.decode(ids) for ids in rollout.completions]
    return judge(reward, [prompt.text for prompt in prompts], texts, columns)


# --- refuse prompts without the columns that a reward reads -----------------------------------------------------------


def refuse_lacking(prompts: Sequence[Prompt], reward: Reward) -> None:
    """Refuse prompts of which one lacks a column that a part of the reward reads: it would fail for a whole rollout.

    Raises:
        ConfigError: at ``task.reward``
    """
    for name, (_, part) in reward.parts().items():
        for column in part.needs():
            lacking = [prompt for prompt in prompts if column not in prompt.columns]
            if lacking:
                rule = f"reads the column {column!r}, which {len(lacking):,} of {len(prompts):,} records lack"
                found = ", ".join(each for each in lacking[0].columns if each != "messages") or "none"
                asks = f"the first asks {lacking[0].text[:60]!r} and has the columns: {found}"
                raise ConfigError("task.reward", name, f"{rule}; {asks}", "Add the column, or choose another reward")
