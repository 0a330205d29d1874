"""A schedule is a pure function of the step: exact at its corners, between 0 and 1 everywhere."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.registry.errors import ConfigError
from blockwright.training.schedulers import SHAPES, Constant, Schedule, WarmupCosine, WarmupStableDecay, WarmupStepDecay

CONF = Path(__file__).parents[2] / "conf" / "scheduler"
SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "warmup_cosine": WarmupCosine,
    "warmup_stable_decay": WarmupStableDecay,
    "warmup_step_decay": WarmupStepDecay,
}


def curve(schedule: Schedule, max_steps: int) -> list[float]:
    schedule.check(max_steps)
    return [schedule.factor(step, max_steps) for step in range(max_steps)]


# Values


def test_constant_warms_up_linearly_and_stays_and_needs_no_end() -> None:
    assert curve(Constant(4), 8) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert curve(Constant(1), 3) == [1.0, 1.0, 1.0]
    assert [Constant(0.25).warmup_steps(max_steps) for max_steps in (1, 2, 8, 11, 1000)] == [1, 1, 2, 3, 250]
    assert [Constant(0.25).factor(step, 8) for step in range(3)] == [0.5, 1.0, 1.0]
    Constant(2).check(-1)
    assert [Constant(2).factor(step, -1) for step in (0, 1, 10**6)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [WarmupCosine(0.1), WarmupStableDecay(0.1), WarmupStepDecay(0.1)])
def test_past_the_end_the_last_factor_holds(schedule: Schedule) -> None:
    assert schedule.factor(100, 100) == schedule.factor(1000, 100) == schedule.factor(99, 100)


def test_cosine_is_exact_at_peak_middle_and_end() -> None:
    values = curve(WarmupCosine(warmup=10, min_ratio=0.1), 110)
    assert values[0] == 0.1
    assert values[9] == 1.0
    assert values[59] == pytest.approx(0.55)
    assert values[109] == pytest.approx(0.1)
    assert values[34] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize(("shape", "middle", "quarter"), [
    ("linear", 0.5, 0.75), ("cosine", 0.5, (1 + math.sqrt(0.5)) / 2), ("sqrt", 1 - math.sqrt(0.5), 0.5),
])  # fmt: skip
def test_wsd_is_exact_at_its_corners(shape: Any, middle: float, quarter: float) -> None:
    values = curve(WarmupStableDecay(warmup=10, decay=20, min_ratio=0.0, shape=shape), 100)
    assert values[:10] == [(step + 1) / 10 for step in range(10)]
    assert values[10:80] == [1.0] * 70
    assert values[80] < 1.0
    assert values[84] == pytest.approx(quarter)
    assert values[89] == pytest.approx(middle)
    assert values[99] == pytest.approx(0.0, abs=1e-12)


def test_wsd_lengths_may_be_fractions_and_the_decay_begins_at_the_peak() -> None:
    steps = curve(WarmupStableDecay(warmup=10, decay=20, min_ratio=0.3), 100)
    assert curve(WarmupStableDecay(warmup=0.1, decay=0.2, min_ratio=0.3), 100) == steps
    assert steps[-1] == pytest.approx(0.3)
    values = curve(WarmupStableDecay(0.5, 0.5, shape="linear"), 7)  # 3.5 steps each, rounded to 4 and what is left
    assert values == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3, 0])


def test_steps_fall_at_the_milestones_of_deepseek_v2_and_of_deepseek_moe_16b() -> None:
    schedule = WarmupStepDecay()
    schedule.check(215_000)
    factor = {step: schedule.factor(step, 215_000) for step in (0, 1999, 128_999, 129_000, 193_499, 193_500, 214_999)}
    assert factor == {
        0: 1 / 2000, 1999: 1.0, 128_999: 1.0, 129_000: 0.316, 193_499: 0.316, 193_500: 0.316**2, 214_999: 0.316**2,
    }  # fmt: skip
    schedule = WarmupStepDecay(warmup=2000, milestones=[0.8, 0.9])
    assert [schedule.factor(step, 100_000) for step in (79_999, 80_000, 90_000)] == [1.0, 0.316, 0.316**2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_yaml_of_every_schedule_survives_a_dry_run_of_a_few_steps(name: str) -> None:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del node["_target_"]
    assert all(curve(SCHEDULES[name](**node), max_steps)[0] > 0 for max_steps in (1, 2, 3, 5))


# Properties

lengths = st.one_of(st.integers(1, 40), st.floats(0.01, 0.4))
ratios = st.floats(0, 1)
schedules = st.one_of(
    st.builds(Constant, lengths),
    st.builds(WarmupCosine, lengths, ratios),
    st.builds(WarmupStableDecay, lengths, lengths, ratios, st.sampled_from(sorted(SHAPES))),
    st.builds(WarmupStepDecay, lengths, st.lists(st.floats(0.45, 0.95), max_size=4, unique=True).map(sorted), ratios),
)


@settings(max_examples=40)
@given(schedules, st.integers(100, 400))
def test_it_rises_strictly_to_the_peak_never_again_and_lies_between_0_and_1(schedule: Schedule, max_steps: int) -> None:
    values, warmup = curve(schedule, max_steps), schedule.warmup_steps(max_steps)
    assert values[warmup - 1] == 1.0
    assert all(later > earlier for earlier, later in pairwise(values[:warmup]))
    assert all(later <= earlier for earlier, later in pairwise(values[warmup - 1 :]))
    assert all(0 <= value <= 1 for value in values)
    assert values[0] == 1 / schedule.warmup_steps(max_steps)


@settings(max_examples=40)
@given(lengths, ratios, st.integers(100, 400))
def test_the_last_step_has_the_lowest_rate(warmup: int | float, low: float, max_steps: int) -> None:
    assert curve(WarmupCosine(warmup, low), max_steps)[-1] == pytest.approx(low, abs=1e-9)
    assert curve(WarmupStableDecay(warmup, 0.3, low), max_steps)[-1] == pytest.approx(low, abs=1e-9)


@settings(max_examples=40)
@given(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=3, unique=True).map(sorted), st.integers(50, 5000))
def test_each_milestone_is_the_first_step_of_its_stair(milestones: list[float], max_steps: int) -> None:
    schedule = WarmupStepDecay(1, milestones, 0.5)
    for milestone in milestones:
        step = round(milestone * max_steps)
        passed = sum(round(other * max_steps) <= step for other in milestones)
        assert schedule.factor(step, max_steps) == 0.5**passed
        assert schedule.factor(step - 1, max_steps) > 0.5**passed


# As configuration


REFUSED = [
    ("constant", "warmup", (0, -5, 1.0, True, "2%", math.nan)),
    ("warmup_cosine", "min_ratio", (1.5, -0.1, math.nan)),
    ("warmup_stable_decay", "min_ratio", (2,)),
    ("warmup_stable_decay", "decay", (0,)),
    ("warmup_stable_decay", "shape", ("exp",)),
    ("warmup_step_decay", "milestones", ([0.9, 0.6], [0.6, 0.6], [0.6, 1.0], [600, 900])),
    ("warmup_step_decay", "gamma", (3.16,)),
]


@pytest.mark.parametrize(("name", "key", "values"), REFUSED)
def test_values_that_cannot_be_right_are_refused(name: str, key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            SCHEDULES[name](**{key: value})
        assert caught.value.path == f"scheduler.{key}" and caught.value.remedy


TOO_SHORT: list[tuple[Schedule, float, str]] = [
    (Constant(11), 10, "scheduler.warmup"),
    (WarmupCosine(2000), 1000, "scheduler.warmup"),
    (WarmupStepDecay(), 1000, "scheduler.warmup"),
    (WarmupStableDecay(60, 50), 100, "scheduler.decay"),
    (WarmupStableDecay(0.6, 0.5), 100, "scheduler.decay"),
    (WarmupStableDecay(10, 91), 100, "scheduler.decay"),
    (WarmupStepDecay(70), 100, "scheduler.milestones"),
    (WarmupCosine(), -1, "trainer.max_steps"),
    (WarmupCosine(10), math.inf, "trainer.max_steps"),
    (Constant(0.1), -1, "trainer.max_steps"),
]


def test_a_training_that_is_too_short_is_refused_and_one_that_is_filled_exactly_is_not() -> None:
    for schedule, max_steps, path in TOO_SHORT:
        with pytest.raises(ConfigError) as caught:
            schedule.check(max_steps)  # type: ignore[arg-type]
        assert caught.value.path == path and caught.value.remedy
    for schedule, exactly in (
        *((Constant(10), 10), (WarmupStableDecay(10, 90), 100)),
        *((WarmupStableDecay(0.5, 0.5), 3), (WarmupStepDecay(60), 100)),
    ):
        schedule.check(exactly)
