"""Which groups of completions teach nothing."""

from __future__ import annotations

from typing import Any

import pytest

from blockwright import registry
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.alignment.rollouts.group_sampler import GroupSampler
from blockwright.registry import Node, Scope

NAN = float("nan")


def sampler(reward: Any) -> GroupSampler:
    scope = Scope({}, {})
    parts = [
        registry.build(kind, Node(node, "task"), scope) for kind, node in (("reward", reward), ("advantage", "group"))
    ]
    return GroupSampler(None, *parts, Sampling(1.0), 3, 4, 1, 0)  # type: ignore[arg-type]  # samples nothing


@pytest.mark.parametrize(
    ("rewards", "flat"),
    [
        ([1, 1, 1], True),
        ([0, 1, 0], False),
        ([1, NAN, 1], True),
        ([NAN, 0.5, NAN], True),
        ([NAN, NAN, NAN], True),
        ([1, NAN, 0], False),
        ([-1, NAN, -1], True),
    ],
)
def test_group_is_flat_where_all_that_is_judged_is_equal(rewards: list[float], flat: bool) -> None:
    found = sampler("exact_match")._flat({"exact_match": [float(r) for r in rewards] + [0.0, 1.0, 0.0]})
    assert found.tolist() == [flat, False]


def test_total_is_of_the_parts_that_have_a_reward() -> None:
    both = sampler({"name": "weighted", "rewards": ["exact_match", "arithmetic"], "weights": [2, 1]})
    total = both.total({"exact_match": [1, NAN, NAN], "arithmetic": [NAN, 0.5, NAN]})
    assert total[:2].tolist() == [2, 0.5] and total[2].isnan()
