"""What differs between a checkpoint's settings and a run's, and what of it alters what the weights mean."""

from __future__ import annotations

from typing import Any

import pytest

from blockwright.training.checkpoints.changes import Change, changes, is_same_run, listed, table
from blockwright.training.checkpoints.record import Past


def of(there: dict[str, Any], here: dict[str, Any], complete: bool = True) -> list[Change]:
    return changes(Past(there, complete, 4, None), here)


@pytest.mark.parametrize(
    ("path", "alters"),
    [
        ("model.position", True),
        ("model.position.theta", True),
        ("model.gating.top_k", True),
        ("model.gating.scaling", True),
        ("model.residual", True),
        ("model.logit_softcap", True),
        ("model.max_positions", False),
        ("model.init.std", False),
        ("model.mtp.loss_weight", False),
        ("model.gating.balance", False),
        ("model.gating.balance.alpha", False),
        ("model.gating.bias_step", False),
        ("model.ffn.dropping", False),
        ("optimizer.lr", False),
        ("seed", False),
    ],
)
def test_what_the_output_depends_on_alters_the_weights(path: str, alters: bool) -> None:
    assert Change(path, 1, 2).alters_weights is alters


def test_another_block_is_one_change_and_a_parameter_of_the_same_is_its_own() -> None:
    rope = {"name": "rope", "theta": 1.0, "fraction": 1.0}
    assert [str(c) for c in of({"model": {"position": rope}}, {"model": {"position": {"name": "alibi"}}})] == [
        "model.position was rope, is alibi"
    ]
    assert [c.path for c in of({"model": {"position": rope}}, {"model": {"position": {**rope, "theta": 2.0}}})] == [
        "model.position.theta"
    ]


def test_nothing_written_in_two_ways_is_no_change() -> None:
    assert not of({"model": {"layout": None, "overrides": []}}, {"model": {"layout": {}, "overrides": None}})


def test_child_that_is_null_differs_from_one_that_is_not_written() -> None:
    null, absent = {"model": {"attention": {"qk_norm": None}}}, {"model": {"attention": {}}}
    assert [str(c) for c in of(null, absent)] == ["model.attention.qk_norm was null, is not set"]
    assert not of(null, absent, complete=False)  # an older version wrote out what was not set


def test_longer_run_is_the_same_run() -> None:
    there = {"seed": 0, "trainer": {"max_steps": 3}}
    assert is_same_run(Past(there, True, 3, None), {"seed": 0, "trainer": {"max_steps": 9}})
    assert not is_same_run(Past(there, True, 3, None), {"seed": 1, "trainer": {"max_steps": 3}})


def test_table_and_sentence_show_both_values() -> None:
    found = [
        Change("seed", 0, 5),
        Change("model.tie_embeddings", True, None),
        Change("a", "x" * 99, []),
        Change("b", 1, 2),
    ]
    lines = table(found).splitlines()
    assert lines[1].split() == ["seed", "0", "5"] and lines[2].split() == ["model.tie_embeddings", "true", "null"]
    assert len(lines[3]) < 90
    assert listed(found[:1]) == "seed was 0, is 5" and listed(found).endswith("and 1 more")


def test_default_that_one_command_line_writes_out_is_no_change() -> None:
    cosine = {"_target_": "blockwright.training.schedulers.warmup_cosine.WarmupCosine", "warmup": 5}
    assert not of({"scheduler": {**cosine, "min_ratio": 0.1}}, {"scheduler": cosine})
    assert [str(c) for c in of({"scheduler": cosine}, {"scheduler": {**cosine, "min_ratio": 0.5}})] == [
        "scheduler.min_ratio was not set, is 0.5"
    ]
