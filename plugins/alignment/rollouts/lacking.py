"""Refuse prompts without the columns that a reward reads."""

from __future__ import annotations

from collections.abc import Sequence

from blockwright.plugins.alignment.data.prompts import Prompt
from blockwright.plugins.alignment.rewards.base import Reward
from blockwright.registry import ConfigError


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
