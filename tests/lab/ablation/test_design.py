"""How an ablation grows: tries, further tries, fresh seeds at the vertex, looks; from results of a known truth."""

import itertools
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from blockwright.lab.ablation import design
from blockwright.lab.ablation.scheme import Recipe, Scheme
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import verdicts
from blockwright.lab.statistics.tuning import Aim
from blockwright.lab.sweep import plan as plans
from blockwright.registry import ConfigError
from blockwright.training.result import Result

ROOT = Path(__file__).resolve().parents[3]
RATE, INIT = "optimizer.lr", "model.init.std"
SCHEME = Scheme(
    {arm: Recipe((f"model/attention={arm}",), values={RATE: 0.01, INIT: 0.02}) for arm in ("mha", "gqa")},
    baseline="mha",
    tune={RATE: 5},
    sd_of_run=0.01,
    seeds=(0, 1, 2),
)
OTHER = "val/other"  # the same number, of which more may be better
BEST = {"mha": 0.013, "gqa": 0.02}  # rates


def parabola(arm, tries, seed):
    """0.02 nats an octave² beside each arm's best rate."""
    return 2 + 0.02 * math.log2(tries.get(RATE, 0.01) / BEST[arm]) ** 2


def begin(scheme, folder, direction="minimize"):
    """The folder of an ablation, planned."""
    arms = [{"name": a, "baseline": a == scheme.baseline, "overrides": [], "figures": {}} for a in scheme.compared]
    plan = {"kind": "ablation", "name": "x", "metric": "val/loss", "direction": direction, "arms": arms}
    plans.write(folder, {**plan, **asdict(scheme), "jobs": design.first(scheme)})
    return folder


def end(folder, loss, **more):
    """Write the results of all jobs that have none."""
    for job in plans.read(folder)["jobs"]:
        if not (folder / str(job["job"])).exists():
            value = loss(job["arm"], job.get("tries", {}), job["seed"])
            ended = {"status": "completed", "metrics": {"val/loss": value, OTHER: value}}
            lost = {"status": "diverged", "reason": "its loss is nan"}
            result = Result.of({**(ended if math.isfinite(value) else lost), **more})
            result.write(folder / str(job["job"]))


def play(scheme, folder, loss, **more):
    """All jobs of an ablation, from the first to the last."""
    begin(scheme, folder)
    end(folder, loss, **more)
    while plans.grow(folder, plans.read(folder)):
        end(folder, loss, **more)
    return plans.read(folder)["jobs"]


@pytest.fixture
def played(tmp_path):
    """All jobs of an ablation in a folder of its own."""
    number = itertools.count()
    return lambda scheme, loss, **more: play(scheme, tmp_path / str(next(number)), loss, **more)


def stage(jobs, name, arm=""):
    return [job for job in jobs if job.get("stage") == name and arm in ("", job["arm"])]


def test_each_arm_is_compared_by_fresh_seeds_at_its_vertex(played):
    jobs = played(SCHEME, parabola)
    for arm, best in BEST.items():
        tries, compared = stage(jobs, "tune", arm), stage(jobs, "compare", arm)
        assert [job["lr"] for job in tries] == [0.0025, 0.005, 0.01, 0.02, 0.04]
        assert [job["seed"] for job in compared] == [0, 1, 2]
        assert [job["lr"] for job in compared] == [pytest.approx(best, rel=0.01)] * 3
        assert all(
            f"optimizer.lr={job['lr']!r}" in job["overrides"] and job["tries"] == {RATE: job["lr"]} for job in jobs
        )
        assert len({job["seed"] for job in tries}) == 1 and tries[0]["seed"] not in (0, 1, 2)
    assert all(len(f"{job['lr']:.9g}".strip("0.").replace(".", "")) <= 3 for job in jobs)
    assert [job["job"] for job in jobs] == list(range(16))


def test_tries_of_several_seeds_are_judged_by_their_mean(tmp_path):
    def shaken(arm, tries, seed):
        """Of each tuning seed another vertex, two octaves apart; their mean has the true one."""
        off = {10_000: 1.0, 10_001: -1.0}.get(seed, 0.0)
        return 2 + 0.02 * (math.log2(tries.get(RATE, 0.01) / BEST[arm]) - off) ** 2 + 0.001 * seed % 0.01

    jobs = play(replace(SCHEME, tune_seeds=2), tmp_path, shaken)
    for arm, best in BEST.items():
        tries = stage(jobs, "tune", arm)
        assert [(job["lr"], job["seed"]) for job in tries[:2]] == [(0.0025, 10_000), (0.0025, 10_001)]
        assert len(tries) == 10
        assert [job["lr"] for job in stage(jobs, "compare", arm)] == [pytest.approx(best, rel=0.01)] * 3
    (tuned,) = find(read(tmp_path)).arms[0].tuned
    assert [each.seeds for each in tuned.tries] == [2] * 5


def test_tries_may_be_judged_by_another_figure_than_the_compared_one(tmp_path):
    def compared(arm, tries, seed):
        """Best far from the rates at which the other figure, of which more is better, is best."""
        return -parabola(arm, tries, seed) + 0.001 * seed

    own = play(SCHEME, tmp_path / "own", compared)
    for arm, best in BEST.items():
        assert all(job["lr"] != pytest.approx(best, rel=0.2) for job in stage(own, "compare", arm))
    jobs = play(replace(SCHEME, tuned_by=Aim(OTHER, "maximize")), tmp_path / "other", compared)
    for arm, best in BEST.items():
        assert [job["lr"] for job in stage(jobs, "compare", arm)] == [pytest.approx(best, rel=0.01)] * 3

    findings = find(read(tmp_path / "other"))
    assert findings.sweep.metric == "val/loss"
    for arm in findings.arms:
        (tuned,) = arm.tuned
        assert tuned.used == pytest.approx(BEST[arm.name], rel=0.01) and not tuned.edge
        assert tuned.fit and tuned.fit.vertex == pytest.approx(BEST[arm.name], rel=0.01)
    assert findings.others[0].evidence and findings.others[0].evidence.spread
    assert findings.others[0].evidence.spread.floor == 0  # what tuning leaves is in another figure's unit


def test_tries_go_beyond_an_edge_for_all_arms_in_bounded_rounds(played):
    far = {"mha": 0.01, "gqa": 0.16}
    jobs = played(SCHEME, lambda arm, tries, _: 2 + 0.02 * math.log2(tries[RATE] / far[arm]) ** 2)
    assert len(stage(jobs, "tune", "mha")) == len(stage(jobs, "tune", "gqa")) == 9
    assert {0.08, 0.16, 0.32} <= {job["lr"] for job in stage(jobs, "tune", "gqa")}
    assert stage(jobs, "compare", "gqa")[0]["lr"] == pytest.approx(0.16, rel=0.02)
    jobs = played(SCHEME, lambda arm, tries, _: 3 - math.log2(tries[RATE]) * (0.1 if arm == "gqa" else 0))
    assert len(stage(jobs, "tune", "gqa")) == len(stage(jobs, "tune", "mha")) == 5 + 2 * design.ROUNDS
    assert stage(jobs, "compare", "gqa")[0]["lr"] == max(job["lr"] for job in stage(jobs, "tune", "gqa"))
    jobs = played(SCHEME, lambda arm, tries, seed: math.inf if tries[RATE] > 0.03 else parabola(arm, tries, seed))
    assert all(job["lr"] < 0.03 for job in stage(jobs, "compare"))


def test_more_of_a_figure_may_be_better(tmp_path):
    begin(SCHEME, tmp_path, "maximize")
    end(tmp_path, lambda *given: -parabola(*given))
    plans.grow(tmp_path, plans.read(tmp_path))
    assert stage(plans.read(tmp_path)["jobs"], "compare", "gqa")[0]["lr"] == pytest.approx(BEST["gqa"], rel=0.01)


def test_settings_are_tuned_one_after_another(played):
    scheme = replace(SCHEME, tune={RATE: 5, INIT: 3})
    jobs = played(scheme, lambda a, t, s: parabola(a, t, s) + 0.01 * math.log2(t.get(INIT, 0.02) / 0.025) ** 2)
    first, second = ([job for job in stage(jobs, "tune", "gqa") if len(job["tries"]) == n] for n in (1, 2))
    assert len(first) == 5 and [job["tries"][INIT] for job in second] == [0.01, 0.02, 0.04]
    assert [job["tries"][RATE] for job in second] == [pytest.approx(BEST["gqa"], rel=0.01)] * 3
    (compared,) = {tuple(job["tries"].items()) for job in stage(jobs, "compare", "gqa")}
    assert dict(compared) == {RATE: second[0]["tries"][RATE], INIT: pytest.approx(0.025, rel=0.02)}


def test_try_that_is_run_again_with_another_result_changes_no_compared_rate(tmp_path):
    rates = {
        job["lr"] for job in stage(play(replace(SCHEME, hours=1), tmp_path, parabola, wall_seconds=100), "compare")
    }
    Result("completed", metrics={"val/loss": 1.0}).write(tmp_path / "0")
    for job in range(20):
        result = Result.read(tmp_path / str(job))
        replace(result, wall_seconds=1.0).write(tmp_path / str(job))
    grown = plans.grow(tmp_path, plans.read(tmp_path))
    assert grown == [] or {job["lr"] for job in grown} <= rates


def noisy(effect, sd=0.005):
    """gqa is worse by ``effect``; both are noisy."""

    def loss(arm, tries, seed):
        draw = random.Random(f"{arm} {seed} {sd}").gauss(0, sd)
        return (parabola(arm, tries, seed) if tries else 2.0) + draw + effect * (arm == "gqa")

    return loss


UNTIL = replace(SCHEME, tune=None, seeds=None, until="verdict", looks=(4, 8, 12, 16))


@pytest.mark.slow
def test_difference_that_is_plain_ends_at_an_early_look(played):
    few = played(UNTIL, noisy(0.5))
    many = played(UNTIL, noisy(0.0))
    assert len(few) == 2 * 8 or len(few) == 2 * 4
    assert len(many) == 2 * 16 and [job["seed"] for job in many if job["arm"] == "mha"] == [*range(16)]
    assert all("stage" not in job for job in few)


def test_an_ablation_ends_by_a_verdict_its_hours_or_its_losses(played):
    assert len(played(replace(UNTIL, within=0.05), noisy(0.0))) < 2 * 16
    hours = replace(UNTIL, hours=850 / 3600, workers=2)
    assert len(played(hours, noisy(0.0), wall_seconds=100)) == 2 * 8
    scheme = replace(SCHEME, seeds=None, hours=0.5, workers=2)
    jobs = played(scheme, parabola, wall_seconds=100)
    assert len(stage(jobs, "tune")) == 10 and len(stage(jobs, "compare")) == 2 * 13
    assert len(played(UNTIL, lambda *_: math.inf)) == 2 * 4


@pytest.mark.parametrize(("seconds", "seeds"), [(100, 18), (1000, 2)])
def test_hours_become_seeds_by_the_time_that_jobs_have_taken(seconds, seeds, played):
    jobs = played(replace(UNTIL, until=None, looks=None, hours=0.5, workers=2), noisy(0), wall_seconds=seconds)
    assert len(jobs) == 2 * seeds


def test_pairs_of_the_baseline_measure_the_noise_that_chooses_the_seeds(tmp_path):
    scheme = replace(UNTIL, until=None, looks=None, see=0.01, pairs=3)
    begin(scheme, tmp_path / "begun")
    assert [job["arm"] for job in plans.read(tmp_path / "begun")["jobs"]] == ["mha"] * 6
    quiet, loud = (play(scheme, tmp_path / f"{sd}", noisy(0, sd)) for sd in (0.002, 0.02))
    assert len([j for j in loud if j["arm"] == "gqa"]) > 3 * len([j for j in quiet if j["arm"] == "gqa"]) > 0


def test_added_seeds_start_from_the_weights_of_their_own(played):
    recipes = {**UNTIL.recipes, "mla": Recipe((), init_from="mha")}
    jobs = played(replace(UNTIL, recipes=recipes), lambda *given: 2.0 + given[2] / 100)
    of = {job["job"]: job for job in jobs}
    starts = [of[job["after"]] for job in jobs if job["arm"] == "mla"]
    assert [job["seed"] for job in starts] == [j["seed"] for j in jobs if j["arm"] == "mla"]
    assert {job["arm"] for job in starts} == {"mha"}


@pytest.mark.slow
@pytest.mark.parametrize("done", (5, 10, 20))
def test_killed_ablation_continues_to_the_same_jobs(done, tmp_path):
    scheme = replace(SCHEME, seeds=None, until="verdict", looks=(4, 8))
    whole = play(scheme, tmp_path / "whole", noisy(0.0))
    begin(scheme, tmp_path / "killed")
    for number in range(done):  # results as they were, the plan as it was before they came
        folder = tmp_path / "killed" / str(number)
        if number in {job["job"] for job in plans.read(tmp_path / "killed")["jobs"]}:
            Result.read(tmp_path / "whole" / str(number)).write(folder)
        plans.grow(tmp_path / "killed", plans.read(tmp_path / "killed"))
    end(tmp_path / "killed", noisy(0.0))
    while plans.grow(tmp_path / "killed", plans.read(tmp_path / "killed")):
        end(tmp_path / "killed", noisy(0.0))
    assert plans.read(tmp_path / "killed")["jobs"] == whole


@pytest.mark.slow
def test_equal_arms_are_rarely_called_different(tmp_path):
    scheme = replace(SCHEME, seeds=None, until="verdict", looks=(4, 8, 12, 16), sd_of_run=0.005)
    draw, false = random.Random(36), 0
    for number in range(12):
        best = {arm: 0.01 * 2 ** draw.uniform(-1, 1) for arm in BEST}

        def loss(arm, tries, seed, best=best, number=number):
            noise = random.Random(f"{number} {arm} {seed} {tries}").gauss(0, 0.005)
            return 2 + 0.03 * math.log2(tries[RATE] / best[arm]) ** 2 + noise

        play(scheme, folder := tmp_path / str(number), loss)
        false += any(verdict.kind in ("better", "worse") for verdict in verdicts(find(read(folder))))
    assert false <= 2


WRONG = [{"recipes": {"mha": {"overrides": []}}}, {"recipes": {"mha": {"overrides": "x"}}}, {"recipes": [1]}]
WRONG += [{"until": "verdict", "looks": None, "seeds": None, "tune": None}, {"looks": ["a"]}, {"hours": -1}]


def test_plan_that_says_what_no_plan_can_is_refused(tmp_path):
    begin(SCHEME, tmp_path)
    end(tmp_path, parabola)
    for wrong in (*WRONG, {"baseline": "mla"}, {"sd_of_run": "small"}):
        with pytest.raises(ConfigError):
            plans.grow(tmp_path, {**plans.read(tmp_path), **wrong})
