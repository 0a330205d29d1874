"""Advantages against values of two other implementations (TRL 1.16, verl), and their properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockwright import registry
from blockwright.plugins.alignment.advantages import Advantage
from blockwright.registry import Node, Scope

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def advantage(name: str) -> Advantage:
    return registry.build("advantage", Node(name, "task.advantage"), Scope({}, {}))


REWARDS = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [0.2, 0.9, 0.5, 0.1]], dtype=torch.float64)[..., None]
ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "key"),
    [("centred", "R-mean"), ("group", "group, std+1e-4"), ("batch", "batch, std+1e-4"), ("rloo", "rloo")],
)
def test_advantages(name: str, key: str) -> None:
    expected = torch.tensor(GOLDEN["advantages"][key], dtype=torch.float64)
    torch.testing.assert_close(advantage(name)(REWARDS, ONE), expected, atol=1e-6, rtol=0)


def test_advantage_leaves_out_what_has_no_reward() -> None:
    rewards = torch.tensor([[1, torch.nan, 0, 1]], dtype=torch.float64)[..., None]
    expected = torch.tensor([GOLDEN["advantages"]["group [1,null,0,1]"]], dtype=torch.float64)
    torch.testing.assert_close(advantage("group")(rewards, ONE), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", registry.names("advantage"))
@pytest.mark.parametrize("parts", [1, 3])
def test_what_has_no_reward_changes_no_other_advantage(name: str, parts: int) -> None:
    """Completions without any reward get 0, and the others what they have without them."""
    rewards = torch.randn(3, 6, parts, dtype=torch.float64, generator=torch.Generator().manual_seed(parts))
    lacking, weights = rewards.clone(), torch.ones(parts, dtype=torch.float64)
    lacking[:, ::2] = torch.nan
    found = advantage(name)(lacking, weights)
    assert not found[:, ::2].any()
    torch.testing.assert_close(found[:, 1::2], advantage(name)(rewards[:, 1::2], weights))


@pytest.mark.parametrize("name", registry.names("advantage"))
def test_advantage_is_zero_without_rewards_and_without_spread(name: str) -> None:
    none, alone = torch.full((2, 4, 1), torch.nan), torch.tensor([[[1.0], [torch.nan]]])
    assert not advantage(name)(none, torch.ones(1)).any()
    assert not advantage(name)(alone, torch.ones(1)).any()
    assert not advantage(name)(torch.full((2, 4, 1), 0.3), torch.ones(1)).abs().gt(1e-3).any()


@pytest.mark.parametrize(("name", "key"), [("group", "sum then normalise"), ("gdpo", "normalise then sum (GDPO)")])
def test_several_rewards(name: str, key: str) -> None:
    second = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0.5]], dtype=torch.float64)
    rewards = torch.stack([REWARDS[[0, 2], :, 0], second], -1)
    found = advantage(name)(rewards, torch.tensor([1.0, 0.5], dtype=torch.float64))
    expected = GOLDEN["advantages"]["weights [1,.5] of [[1,0,0,1],[.2,.9,.5,.1]] and [[0,1,1,1],[1,1,0,.5]]"][key]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
