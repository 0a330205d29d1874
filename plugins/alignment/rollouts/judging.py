"""Judge the completions of a rollout by the columns of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockwright.plugins.alignment.data.prompts import Prompt
from blockwright.plugins.alignment.rewards.base import Reward
from blockwright.plugins.alignment.rewards.judging import judge
from blockwright.plugins.alignment.rollouts.record import Rollout
from blockwright.training.data.tokenizers.base import Tokenizer


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
