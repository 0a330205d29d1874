"""How a ladder grows: tries until every arm is tuned, then trunks and their decays; the same jobs at every start."""

import math
from dataclasses import replace
from pathlib import Path

import ladder_folder
import numpy as np
import pytest
from ladders import ARMS, ladder, loss

from blockwright.lab.ladder import design
from blockwright.lab.ladder.design import Tuned, common_of, compared, tries
from blockwright.lab.ladder.findings import Findings, of_rungs, over_all
from blockwright.lab.ladder.planning import first_jobs
from blockwright.lab.statistics.tuning import Fit, Try
from blockwright.training.result import Result

BEST = {("d0", "a"): 0.02, ("d1", "a"): 0.0125, ("d0", "b"): 0.1, ("d1", "b"): 0.08}


@pytest.fixture
def outline():
    own = ladder_folder.outline({"a": (1, 1), "b": (1, 1)})
    for size in own.sizes.values():
        size.arms.update({arm: replace(cell, start=0.01) for arm, cell in size.arms.items()})
    return replace(own, tune="optimizer.lr", tuned_sizes=("d0", "d1"))


def plan_of(outline):
    jobs = first_jobs(outline)
    return {"kind": "ladder", "metric": "val/loss", "direction": "minimize", "jobs": jobs, "ladder": outline.as_plain()}


def results(plan, curvature=0.05):
    """Losses of parabolas in octaves; the best value of a short duration is twice the best of all, of others half."""
    found = {}
    for job in plan["jobs"]:
        (value,) = job["tries"].values()
        moved = 2.0 if "after" in job else 0.5
        off = math.log2(value / (moved * BEST.get((job["size"], job["arm"]), value)))
        found[job["job"]] = Result("completed", metrics={"val/loss": 2.0 + curvature * off**2})
    return found


def grown(plan, curvature=0.05):
    """The plan when nothing follows any more."""
    while further := design.more(Path(), plan, results(plan, curvature)):
        plan = {**plan, "jobs": [*plan["jobs"], *further]}
    return plan


def test_tries_are_octaves_on_a_seed_of_their_own_with_whole_schedules(outline):
    jobs = first_jobs(outline)
    assert len(jobs) == 2 * 2 * 5 * 2 and {job["seed"] for job in jobs} == {3}
    values = [job["tries"]["optimizer.lr"] for job in jobs[:10:2]]
    assert values == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.04])
    for job in tries(outline, "d0", "b", [0.03], 5):
        steps = outline.sizes["d0"].steps[job["duration"]]
        assert {"optimizer.lr=0.03", "seed=3", f"trainer.max_steps={steps}"} <= set(job["overrides"])


def test_a_value_is_tried_at_every_duration_up_to_the_middle(outline):
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


def rates_of(plan):
    return {(j["size"], j["arm"]): j["tries"]["optimizer.lr"] for j in plan["jobs"] if j["stage"] == "compare"}


def test_arms_are_compared_at_their_vertices_and_beyond_along_a_common_slope(outline):
    plan = grown(plan_of(outline))
    assert plan == grown(plan_of(outline))  # by the folder alone
    tried = {place: [] for place in BEST}
    for job in (each for each in plan["jobs"] if each["stage"] == "tune"):
        tried[job["size"], job["arm"]].append(job["tries"]["optimizer.lr"])
    assert len(tried["d0", "a"]) == len(tried["d0", "b"]) > 5 * 2  # alike, though one is best at the edge
    assert max(tried["d0", "b"]) > 0.1
    rates = rates_of(plan)
    for place, best in BEST.items():
        assert rates[place] == pytest.approx(best, rel=0.03)
    a_size = math.sqrt(0.0125 / 0.02 * 0.08 / 0.1)  # N doubles at each; a slope between those of the two arms
    for arm in "ab":
        middle = math.sqrt(BEST["d0", arm] * BEST["d1", arm])
        assert rates["d3", arm] == pytest.approx(middle * a_size**2.5, rel=0.05)
    alone = rates_of(grown(plan_of(replace(outline, tuned_sizes=("d0",)))))
    assert [alone[size, "a"] for size in outline.sizes] == pytest.approx([0.02] * 4, rel=0.03)


@pytest.mark.parametrize(("second", "a_size"), [(0.005, 2**-0.5), (0.04, 1.0)])
def test_a_rate_neither_rises_nor_falls_faster_than_rates_do(outline, monkeypatch, second, a_size):
    monkeypatch.setattr(f"{__name__}.BEST", {("d0", arm): 0.02 for arm in "ab"} | {("d1", arm): second for arm in "ab"})
    assert rates_of(grown(plan_of(outline)))["d3", "a"] == pytest.approx(
        math.sqrt(0.02 * second) * a_size**2.5, rel=0.05
    )


def test_all_that_diverged_ends_the_tries(outline):
    plan = plan_of(outline)
    while further := design.more(Path(), plan, {job["job"]: Result("diverged") for job in plan["jobs"]}):
        plan = {**plan, "jobs": [*plan["jobs"], *further]}
        assert len(plan["jobs"]) < 1000
    assert sum(job["stage"] == "tune" for job in plan["jobs"]) == 2 * 2 * 2 * (5 + 2 * design.ROUNDS)


def test_a_trunk_keeps_what_its_decays_resume_from():
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


SIZES, RATIOS, GAINS = [1e5 * 2**i for i in range(4)], (5, 10), ((1.0, 1.0), (1.3, 1.2))


def findings(rungs, seeds):
    """Of simulated rungs, as if an outline had planned them."""
    outline = ladder_folder.outline(dict.fromkeys(ARMS[:2], (1.0, 1.0)), seeds=seeds, ratios=RATIOS)
    sizes = {str(i): replace(size, steps={"0": 500, "1": 1000}) for i, size in enumerate(outline.sizes.values())}
    return Findings(Path(), {}, replace(outline, sizes=sizes), tuple(rungs), None, {}, {}, ())


def simulated(rng, seeds=2, **settings):
    return findings(ladder(rng, GAINS, sizes=SIZES, ratios=RATIOS, seeds=seeds, **settings), seeds)


def covers(each, truth):
    return each.interval.low < truth < each.interval.high


@pytest.mark.slow
def test_intervals_of_two_seeds_cover_the_true_differences():
    rng, trials, of_one, of_all, widths = np.random.default_rng(5), 100, 0, 0, []
    truth = {
        (str(i), str(j)): loss(1.3 * size, 1.2 * ratio * size) - loss(size, ratio * size)
        for i, size in enumerate(SIZES)
        for j, ratio in enumerate(RATIOS)
    }
    for _ in range(trials):
        found = simulated(rng)
        rungs, mean = of_rungs(found, ARMS[1]), over_all(found, ARMS[1])
        assert mean is not None and rungs.keys() == truth.keys()
        of_one += covers(rungs["1", "0"], truth["1", "0"])
        of_all += covers(mean, math.fsum(truth.values()) / len(truth))
        widths.append(rungs["1", "0"].interval.half or 0.0)
    assert min(of_one, of_all) / trials >= 0.885  # .95 less three standard errors
    alone = 12.7 * 0.007  # nats, by Student's t of the two differences of a rung
    assert np.mean(widths) < alone / 4


@pytest.mark.slow
def test_an_equal_arm_is_seldom_called_different():
    rng, trials = np.random.default_rng(6), 100
    equal = ((1.0, 1.0), (1.0, 1.0))
    found = (findings(ladder(rng, equal, sizes=SIZES, ratios=RATIOS, seeds=2), 2) for _ in range(trials))
    ps = [mean.p for each in found if (mean := over_all(each, ARMS[1])) is not None]
    assert len(ps) == trials and np.mean([p is not None and p < 0.05 for p in ps]) <= 0.115  # three errors


def test_what_tuning_leaves_widens_them():
    found = simulated(np.random.default_rng(7))
    fit = Fit(0.01, 0.05, 0.004, None, shake=1e4, spread=0.02, dof=3)
    tries = (Try(0.01, 2.0),)
    tuned = {("0", arm): Tuned(tries, fit) for arm in ARMS[:2]}
    other = replace(found, common=common_of(found.outline, tuned, found.seeds.noise.sd_of_run))
    for place in (("0", "0"), ("2", "1")):
        before, after = (of_rungs(each, ARMS[1])[place].interval for each in (found, other))
        assert before.mean == after.mean and after.half > before.half
    mean, wider = (over_all(each, ARMS[1]) for each in (found, other))
    assert wider.p > mean.p and wider.interval.half > mean.interval.half


def test_one_seed_has_no_interval_and_only_common_seeds_count():
    mean = over_all(simulated(np.random.default_rng(8), seeds=1), ARMS[1])
    assert mean.p is None and mean.interval.half is None and mean.interval.n == 1
    whole, place = simulated(np.random.default_rng(9)), ("0", "0")
    losses = {(r.arm, r.size, r.duration, r.seed): r.loss for r in whole.rungs}
    kept = tuple(r for r in whole.rungs if not (r.arm == ARMS[1] and r.seed == 1 and r.size == "0"))
    found = of_rungs(replace(whole, rungs=kept), ARMS[1])[place].interval.mean
    assert found == pytest.approx(losses[ARMS[1], *place, 0] - losses[ARMS[0], *place, 0])
    none = replace(whole, rungs=tuple(r for r in whole.rungs if r.arm == ARMS[0]))
    assert over_all(none, ARMS[1]) is None and of_rungs(none, ARMS[1]) == {}
    alike = over_all(replace(whole, rungs=tuple(replace(r, loss=2.0) for r in whole.rungs)), ARMS[1])
    assert alike.interval.mean == 0.0 and alike.p in (None, 1.0) and (alike.interval.half or 0.0) < 1e-9
