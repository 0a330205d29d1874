from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Number
from blockwright.training.objectives.reward.base import Reward


@register("reward", "weighted")
class Weighted(Reward):
    """The weighted sum of rewards, each of which is logged; DeepSeek-V2's eq. 35 (arXiv 2405.04434).

    A reward that is None is left out of the sum; it is None only where all are. A completion of which a part fails has
    no reward.

    Args:
        rewards: nodes of rewards
        weights: factor of each
    """

    def __init__(self, rewards: list[Reward], weights: list[Number]) -> None:
        if len(rewards) != len(weights) or not rewards:
            rule = f"there must be one for each of the {len(rewards)} rewards, and at least one"
            raise BlockError("weights", weights, rule, "Write as many weights as rewards")
        self.rewards, self.weights = rewards, weights
        self.timeout_s = sum(reward.timeout_s for reward in rewards)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        each = [reward(prompts, completions, **columns) for reward in self.rewards]
        given = (
            [(w, r) for w, r in zip(self.weights, row, strict=True) if r is not None] for row in zip(*each, strict=True)
        )
        return [sum(w * r for w, r in row) if row else None for row in given]

    def needs(self) -> tuple[str, ...]:
        return tuple(name for reward in self.rewards for name in reward.needs())

    def parts(self) -> dict[str, tuple[float, Reward]]:
        found: dict[str, tuple[float, Reward]] = {}
        for weight, reward in zip(self.weights, self.rewards, strict=True):
            for name, (inner, part) in reward.parts().items():
                found[name if name not in found else f"{name}_{len(found)}"] = (weight * inner, part)
        return found
