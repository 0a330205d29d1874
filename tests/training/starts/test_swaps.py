"""Trained weights under another model: another rotary position is an extension, all else is named or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blockwright.blocks.compose import check
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.last_rate import last_rate
from blockwright.training.checkpoints.record import Past
from blockwright.training.starts.swaps import changed_window, check_swaps

Tiny = Callable[..., dict[str, Any]]
ROPE = {"name": "rope", "theta": 500.0, "pairing": "interleaved"}
YARN = {"name": "yarn", "theta": 500.0, "factor": 8.0, "original_positions": 64}


def judged(tiny: Tiny, there: Any, here: Any, allowed: bool = False, **changes: Any) -> list[str]:
    old, new = check(tiny(position=there)), check(tiny(position=here, **changes))
    return check_swaps(old, new, "RUN", allowed)


def test_another_rotary_position_and_more_positions_are_accepted_and_named(tiny: Tiny) -> None:
    assert judged(tiny, ROPE, YARN, max_positions=512) == ["positions: rope → yarn, factor 8"]


def test_a_larger_base_is_accepted_under_rope(tiny: Tiny) -> None:
    assert judged(tiny, ROPE, {**ROPE, "theta": 16000.0}) == ["positions: rope → rope, theta 500 → 16000"]


@pytest.mark.parametrize(
    ("here", "path", "remedy"),
    [
        ({**YARN, "pairing": "half_split"}, "model.position.pairing", "model.position.pairing=interleaved"),
        ({**YARN, "rotary_fraction": 2 / 3}, "model.position.rotary_fraction", "model.position.rotary_fraction=1.0"),
        ({**YARN, "theta": 10000.0}, "model.position.theta", "model.position.theta=500"),
    ],
)
def test_what_would_rotate_other_numbers_is_refused_with_the_value_to_write(
    tiny: Tiny, here: Any, path: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        judged(tiny, ROPE, here, allowed=True)  # not even where other surgery is asked for
    assert caught.value.path == path and remedy in caught.value.remedy


def test_positions_that_are_no_rotation_are_surgery(tiny: Tiny) -> None:
    assert "model.position was rope, is alibi" in judged(tiny, ROPE, "alibi")[0]


def test_any_other_change_is_refused_naming_it_or_warned_about_where_it_was_asked_for(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"model\.norm\.eps was .*, is 0\.1") as caught:
        judged(tiny, ROPE, YARN, norm={"name": "rmsnorm", "eps": 0.1})
    assert caught.value.path == "init_from"
    lines = judged(tiny, ROPE, YARN, allowed=True, norm={"name": "rmsnorm", "eps": 0.1})
    assert "model.norm.eps" in lines[-1]


def test_a_position_within_an_attention_is_compared_too(tiny: Tiny) -> None:
    old = check(tiny(attention={"name": "gqa", "position": ROPE}))
    new = check(tiny(attention={"name": "gqa", "position": {**YARN, "pairing": "half_split"}}))
    with pytest.raises(ConfigError) as caught:
        check_swaps(old, new, "RUN", False)
    assert caught.value.path == "model.attention.position.pairing"


def test_stretching_from_another_length_than_the_trained_one_is_said(tiny: Tiny) -> None:
    model = check(tiny(position=YARN))
    assert changed_window(model, 64) is None and changed_window(model, None) is None
    assert "original_positions is 64" in str(changed_window(model, 128))


def past(rate: float | None, **optimizer: Any) -> Past:
    return Past({"optimizer": {"_target_": "A", "lr": 0.01, **optimizer}}, True, 10, rate)


def test_the_last_rate_is_where_the_run_ended() -> None:
    assert last_rate({"_target_": "A", "lr": "last"}, past(0.1)) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("given", "words"),
    [(None, "names no run"), (past(None), "not recorded"), (past(0.1, _target_="B"), "another optimizer")],
)
def test_a_last_rate_that_is_not_known_is_refused(given: Past | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        last_rate({"_target_": "A", "lr": "last"}, given)
    assert caught.value.path == "optimizer.lr"
