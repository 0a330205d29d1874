"""``blockwright transfer``: its plan grows from tries to a comparison, and its answer is that of known curves."""

import json
import math
import shlex
import shutil

import pytest

from blockwright.lab.statistics.tuning import COMPARE, RATE, TUNE
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.seams import growing_kinds
from blockwright.lab.transfer import design
from blockwright.lab.transfer.__main__ import main
from blockwright.lab.transfer.design import BASE, RULES, STANDARD, TRANSFERRED
from blockwright.registry.folder import read_json
from blockwright.training.result import Result

MODEL = ["data=sorting", "model.n_layers=1", "logger.tensorboard=null", "trainer.max_steps=3", "optimizer.lr=0.01"]
BEST = {BASE: 0.008, RULES: 0.010, STANDARD: 0.002}  # the arms' best rates
FLOOR = {BASE: 2.4, RULES: 2.2, STANDARD: 2.25}
CURVATURE = 0.05  # nats per octave²


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a plan whose jobs have not begun."""
    logs = tmp_path_factory.mktemp("transfer")
    assert main(["base=16", "to=32", "seeds=2", *MODEL, f"paths.log_dir={logs}", "--plan-only"]) == 0
    (directory,) = (logs / "transfer").iterdir()
    return directory


@pytest.fixture(scope="module")
def whole(first, tmp_path_factory):
    """One whose jobs have all ended, and how many each round had."""
    directory = shutil.copytree(first, tmp_path_factory.mktemp("whole") / "one")
    return directory, run(directory)


def loss(job):
    arm = RULES if job["arm"] == TRANSFERRED else job["arm"]
    return FLOOR[arm] + CURVATURE * math.log2(job["tries"][RATE] / BEST[arm]) ** 2 + 0.001 * job["seed"]


def run(directory):
    """Let jobs end with the losses of the curves, until none follow; returns how many each round had."""
    rounds = []
    done = set()
    while True:
        plan = plans.read(directory)
        new = [job for job in plan["jobs"] if job["job"] not in done]
        for job in new:
            result = Result("completed", metrics={"val/loss": loss(job)})
            result.write(directory / str(job["job"]))
            done.add(job["job"])
        rounds.append(len(new))
        if not plans.grow(directory, plan):
            return rounds


def test_the_plan_tunes_three_models_at_equal_tries(first):
    plan = plans.read(first)
    assert "transfer" in growing_kinds()
    rates = {arm: [j["tries"][RATE] for j in plan["jobs"] if j["arm"] == arm] for arm in BEST}
    assert set(map(tuple, rates.values())) == {(0.0025, 0.005, 0.01, 0.02, 0.04)}
    overrides = {arm["name"]: " ".join(arm["overrides"]) for arm in plan["arms"]}
    assert "parametrisation" not in overrides[BASE] + overrides[STANDARD]
    assert "++model.d_model=16" in overrides[BASE] and "++model.d_model=32" in overrides[STANDARD]
    assert "++parametrisation.base={d_model: 16}" in overrides[RULES]


def test_tries_grow_where_a_model_needs_them_then_it_is_compared(whole, capsys):
    directory, rounds = whole
    assert rounds[0] == 15 and rounds[-1] == 6 and len(rounds) > 2  # the best rate of standard is beyond the grid
    plan = plans.read(directory)
    found = design.read(directory, plan)
    for arm, best in BEST.items():
        assert found["rates"][arm]["best"] == pytest.approx(best, rel=0.02)
        assert found["rates"][arm]["edge"] is None
    moved = math.log2(BEST[RULES] / BEST[BASE])
    assert found["octaves"][RULES] == pytest.approx(moved, abs=0.05)
    assert found["excess"]["mean"] == pytest.approx(CURVATURE * moved**2, abs=1e-3)
    assert found["standard"]["mean"] == pytest.approx(0.05 - CURVATURE * moved**2, abs=1e-3)
    compared = [job for job in plan["jobs"] if job["stage"] == COMPARE]
    assert {job["arm"] for job in compared} == {TRANSFERRED, RULES, STANDARD}
    tuned = {job["seed"] for job in plan["jobs"] if job["stage"] == TUNE}
    assert not tuned & {job["seed"] for job in compared}  # fresh seeds
    for cut in (15, 21, len(plan["jobs"]) - 6):  # ends of rounds, at which it may have been killed
        part = {**plan, "jobs": plan["jobs"][:cut]}
        results = {job["job"]: Result.read(directory / str(job["job"])) for job in part["jobs"]}
        assert design.more(directory, part, results) == plan["jobs"][cut : cut + 6]


def test_an_ended_transfer_prints_its_table_and_writes_its_answer_unless_its_plan_is_damaged(whole, tmp_path, capsys):
    directory = shutil.copytree(whole[0], tmp_path / "copy")
    plan = plans.read(directory)
    last = plan["jobs"][-1]
    jobs = [{"arm": "other"}, {"stage": "nowhere"}, {"seed": None}, {"tries": {}}, {"tries": {RATE: -1.0}}]
    damages = [{"jobs": [*plan["jobs"][:-1], {**last, **wrong}]} for wrong in jobs]
    damages += [{"widths": [16]}, {"tune": {"optimizer.b1": 5}}, {"jobs": plan["jobs"][:5]}]
    damaged = [{**plan, **damage} for damage in damages]
    for wrong in (*damaged, *({k: v for k, v in plan.items() if k != key} for key in ("widths", "tune", "arms"))):
        plans.write(directory, wrong)
        assert main([str(directory)]) == 64 and not (directory / design.FILE).exists(), wrong
    plans.write(directory, plan)
    capsys.readouterr()
    assert main([str(directory)]) == 0
    printed = capsys.readouterr().out
    assert "rules, 32, transferred" in printed and "costs +0.0" in printed
    assert read_json(directory, design.FILE)["widths"] == [16, 32]
    json.dumps(read_json(directory, design.FILE), allow_nan=False)


def test_a_best_rate_at_the_end_of_what_was_tried_is_no_verdict_and_diverged_runs_count_as_worst(first, tmp_path):
    directory = shutil.copytree(first, tmp_path / "copy")
    plan = plans.read(directory)
    for job in plan["jobs"]:
        Result("completed", metrics={"val/loss": -math.log2(job["tries"][RATE])}).write(directory / str(job["job"]))
    found = design.read(directory, plan)
    assert found["rates"][BASE]["edge"] == "high"
    assert any("No verdict" in line and "largest" in line for line in design.lines(found))
    status = {job["job"]: "diverged" if job["tries"][RATE] > 0.01 else "completed" for job in plan["jobs"]}
    results = {job["job"]: Result(status[job["job"]], metrics={"val/loss": loss(job)}) for job in plan["jobs"]}
    assert all(each.vertex < 0.0101 for each in design.fits(plan, results).values())


MISTAKES = {
    "to=32": "base",
    "base=32 to=32": "to",
    "base=16 to=32 tries=2": "tries",
    "base=16 to=24 'grow={ffn: {shared: {d_ff: 3}}}'": "grow.ffn.shared.d_ff",
    "nowhere": "DIR",
    ". seeds=3": "command line",
    "base=16 to=32 model.d_model=64": "model.d_model",
    "base=16 to=32 hydra.run.dir=x": "hydra.run.dir",
    "base=16 to=32 paths.log_dir=/dev/null/x": "paths.log_dir",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_refused_before_a_plan_is_written(words, tmp_path, capsys):
    more = [*MODEL, f"paths.log_dir={tmp_path}"] if "to=" in words else []
    assert main([*more, *shlex.split(words)]) == 64
    assert capsys.readouterr().err.startswith(f"error: {MISTAKES[words]} ")
    assert not list(tmp_path.iterdir())
