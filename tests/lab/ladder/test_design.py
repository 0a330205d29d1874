"""How a ladder grows: tries until every arm is tuned, then trunks and their decays; the same jobs at every start."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ladder_folder
import pytest

from blockwright.lab.ladder import design
from blockwright.lab.ladder.outline import Cell, Outline, compared, tries
from blockwright.lab.ladder.planning import first_jobs
from blockwright.training.result import Result

BEST = {("d0", "a"): 0.02, ("d1", "a"): 0.0125, ("d0", "b"): 0.1, ("d1", "b"): 0.08}
Plan = dict[str, Any]


@pytest.fixture
def outline() -> Outline:
    own = ladder_folder.outline({"a": (1, 1), "b": (1, 1)})
    for size in own.sizes.values():
        size.arms.update({arm: replace(cell, start=0.01) for arm, cell in size.arms.items()})
    return replace(own, tune="optimizer.lr", tuned_sizes=("d0", "d1"))


def plan_of(outline: Outline) -> Plan:
    jobs = first_jobs(outline)
    return {"kind": "ladder", "metric": "val/loss", "direction": "minimize", "jobs": jobs, "ladder": outline.as_plain()}


def results(plan: Plan, curvature: float = 0.05) -> dict[int, Result]:
    """Losses of parabolas in octaves; the best value of a short duration is twice the best of all, of others half."""
    found = {}
    for job in plan["jobs"]:
        (value,) = job["tries"].values()
        moved = 2.0 if "after" in job else 0.5
        off = math.log2(value / (moved * BEST.get((job["size"], job["arm"]), value)))
        found[job["job"]] = Result("completed", metrics={"val/loss": 2.0 + curvature * off**2})
    return found


def grown(plan: Plan, curvature: float = 0.05) -> Plan:
    """The plan when nothing follows any more."""
    while further := design.more(Path(), plan, results(plan, curvature)):
        plan = {**plan, "jobs": [*plan["jobs"], *further]}
    return plan


def test_the_first_jobs_try_octaves_on_a_seed_of_their_own(outline: Outline) -> None:
    jobs = first_jobs(outline)
    assert len(jobs) == 2 * 2 * 5 * 2 and {job["seed"] for job in jobs} == {3}
    values = [job["tries"]["optimizer.lr"] for job in jobs[:10:2]]
    assert values == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.04])


def test_a_value_is_tried_at_every_duration_up_to_the_middle(outline: Outline) -> None:
    """Of which the shorter are decays of the trunk that the longest is; the mean loss of them counts."""
    short, middle, _ = outline.sizes["d0"].steps
    trunk, decay = first_jobs(outline)[:2]
    assert (trunk["duration"], decay["duration"]) == (middle, short)
    assert "after" not in trunk and decay["after"] == trunk["job"] and decay["tries"] == trunk["tries"]
    assert f"steps:[{decay['from_step']}]" in trunk["overrides"][-1]
    plan = plan_of(outline)
    (lost, *_), known = plan["jobs"], results(plan)
    tried = design.tried_of(plan, known)["d0", "a"]
    assert [each.loss for each in tried] == [
        sum(known[i].metrics["val/loss"] for i in (at, at + 1)) / 2 for at in range(0, 10, 2)
    ]
    assert design.tried_of(plan, known | {lost["job"]: Result("diverged")})["d0", "a"][0].diverged


def test_a_best_at_the_edge_is_looked_for_beyond_and_arms_are_alike_in_tries(outline: Outline) -> None:
    plan = grown(plan_of(outline))
    tried = {
        place: [j for j in plan["jobs"] if j["stage"] == "tune" and (j["size"], j["arm"]) == place] for place in BEST
    }
    assert len(tried["d0", "a"]) == len(tried["d0", "b"]) > 5 * 2
    assert max(job["tries"]["optimizer.lr"] for job in tried["d0", "b"]) > 0.1


def test_arms_are_compared_at_their_vertices_and_beyond_along_a_common_slope(outline: Outline) -> None:
    plan = grown(plan_of(outline))
    rates = {(j["size"], j["arm"]): j["tries"]["optimizer.lr"] for j in plan["jobs"] if j["stage"] == "compare"}
    for place, best in BEST.items():
        assert rates[place] == pytest.approx(best, rel=0.03)
    a_size = math.sqrt(0.0125 / 0.02 * 0.08 / 0.1)  # N doubles at each; a slope between those of the two arms
    for arm in "ab":
        middle = math.sqrt(BEST["d0", arm] * BEST["d1", arm])
        assert rates["d3", arm] == pytest.approx(middle * a_size**2.5, rel=0.05)


@pytest.mark.parametrize(("second", "a_size"), [(0.005, 2**-0.5), (0.04, 1.0)])
def test_a_rate_neither_rises_nor_falls_faster_than_rates_do(
    outline: Outline, monkeypatch: pytest.MonkeyPatch, second: float, a_size: float
) -> None:
    """As the noise of two vertices would have it, for all sizes beyond."""
    monkeypatch.setattr(f"{__name__}.BEST", {("d0", arm): 0.02 for arm in "ab"} | {("d1", arm): second for arm in "ab"})
    plan = grown(plan_of(outline))
    rates = {(j["size"], j["arm"]): j["tries"]["optimizer.lr"] for j in plan["jobs"] if j["stage"] == "compare"}
    assert rates["d3", "a"] == pytest.approx(math.sqrt(0.02 * second) * a_size**2.5, rel=0.05)


def test_one_tuned_size_gives_its_value_to_all(outline: Outline) -> None:
    plan = grown(plan_of(replace(outline, tuned_sizes=("d0",))))
    rates = {(j["size"], j["arm"]): j["tries"]["optimizer.lr"] for j in plan["jobs"] if j["stage"] == "compare"}
    assert [rates[size, "a"] for size in outline.sizes] == pytest.approx([0.02] * 4, rel=0.03)


def test_all_that_diverged_ends_the_tries(outline: Outline) -> None:
    plan = plan_of(outline)
    for _ in range(10):
        lost = {job["job"]: Result("diverged") for job in plan["jobs"]}
        further = design.more(Path(), plan, lost)
        plan = {**plan, "jobs": [*plan["jobs"], *further]}
        if not further:
            break
    assert sum(job["stage"] == "tune" for job in plan["jobs"]) == 2 * 2 * 2 * (5 + 2 * design.ROUNDS)


def test_growth_depends_on_the_folder_alone(outline: Outline) -> None:
    assert grown(plan_of(outline)) == grown(plan_of(outline))


def test_a_trunk_keeps_what_its_decays_resume_from() -> None:
    own = ladder_folder.outline({"a": (1, 1)}, sizes=2, seeds=1)
    jobs = compared(own, {}, 7)
    assert [job["job"] for job in jobs] == list(range(7, 13))
    trunk, short, middle = jobs[:3]
    assert "after" not in trunk and short["after"] == middle["after"] == 7
    assert (short["from_step"], middle["from_step"]) == (400, 800), "500 and 1000 steps less a fifth"
    assert "steps:[400,800]" in next(o for o in trunk["overrides"] if "milestones" in o)
    assert "trainer.max_steps=2000" in trunk["overrides"] and "scheduler.decay=100" in short["overrides"]
    warmups = {next(o for o in job["overrides"] if "warmup=" in o) for job in (trunk, short, middle)}
    assert warmups == {"scheduler.warmup=40"}
    assert short["tokens"] == 500_000


def test_a_try_has_the_value_and_the_whole_schedule(outline: Outline) -> None:
    for job in tries(outline, "d0", "b", [0.03], 5):
        steps = outline.sizes["d0"].steps[job["duration"]]
        assert {"optimizer.lr=0.03", "seed=3", f"trainer.max_steps={steps}"} <= set(job["overrides"])
    assert isinstance(outline.sizes["d0"].arms["b"], Cell)
