from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from blockwright.plugins.alignment.rewards.base import Column, Reward, Rewards, Texts, column
from blockwright.registry import register
from blockwright.registry.extras import require

NAMES = ("task", "settings", "seed", "number")  # columns that name a problem


@register("reward", "reasoning_gym")
class ReasoningGymReward(Reward):
    """What the verifier of a problem of reasoning-gym gives a completion, 0 to 1, blanks at both ends aside.

    For problems of the corpus ``ReasoningGym`` (data/reasoning_gym.py), whose columns name them.
    """

    bounds = (0.0, 1.0)

    def __init__(self) -> None:
        require("alignment", "reasoning_gym", path="task.reward", value="reasoning_gym")

    def needs(self) -> tuple[str, ...]:
        return NAMES

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        named = [column(columns, name, "reasoning_gym") for name in NAMES]
        return [_score(text.strip(), *which) for text, *which in zip(completions, *named, strict=True)]


def _score(text: str, task: str, settings: dict[str, Any], seed: int, number: int) -> float:
    drawn = _problems(task, json.dumps(settings, sort_keys=True), seed)
    return float(drawn.score_answer(text, drawn[number]))


@lru_cache(maxsize=64)
def _problems(task: str, settings: str, seed: int) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, **json.loads(settings), seed=seed, size=2**31)  # drawn by number: the size is no matter
