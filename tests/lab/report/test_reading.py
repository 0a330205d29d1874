"""What lies in a sweep's folder: with a plan and without, whole, half-finished and damaged."""

import json
import math
from pathlib import Path

import pytest
from sweep_folder import ablation, completed, described, grid, write_job

from blockwright.lab.report import build, words
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.sentences import method
from blockwright.lab.report.verdict import verdict

TWO = {"mha": [2.0, 2.1], "mla": [1.9, 2.0]}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return ablation(tmp_path_factory.mktemp("ablation"))


def test_plan_names_arms_and_baseline(planned):
    sweep = read(planned)
    assert [arm.name for arm in sweep.arms] == ["mha", "gqa", "mla", "moe", "broken <b>&"]
    assert (sweep.kind, sweep.name, sweep.metric, sweep.maximize) == ("ablation", "attention", "val/loss", False)
    assert sweep.arms[sweep.baseline].name == "mha"
    assert [run.job for run in sweep.arms[2].runs] == [6, 7, 8] and [r.seed for r in sweep.arms[2].runs] == [0, 1, 2]
    assert sweep.arms[2].match["residual"]["cache_bytes"] == 144 / 512 - 1


def test_lost_runs_have_their_reasons_and_speed_ups_are_over_common_seeds(planned):
    findings = find(read(planned))
    told = {run.job: findings.why_lost(run) for run in findings.lost}
    assert told.keys() == {5, 12, 13, 14}
    assert told[5] == "diverged: diverged at step 57: its loss is nan" and "ConfigError" in told[12]
    _, gqa, mla, _, broken = findings.arms
    assert broken.interval is None and verdict(broken, findings).why == "lost"
    assert gqa.comparison.by_seed.keys() == {0, 1} and verdict(gqa, findings).why == "lost_seeds"
    assert mla.speed_up.n == 3 and 1.0 < mla.speed_up.mean < 1.5 and gqa.speed_up.n == 2
    assert findings.baseline.speed_up is None and broken.speed_up is None
    assert mla.figures["params"] == 1_020_000 and mla.figures["cache_bytes"] == 144
    assert broken.figures["params"] == 1_000_000  # never ran: of the plan


def test_without_a_plan_runs_that_differ_in_the_seed_are_one_arm(tmp_path, monkeypatch):
    sweep = read(grid(tmp_path, TWO))
    assert [arm.name for arm in sweep.arms] == ["mha", "mla"] and sweep.baseline == 0
    assert [[run.seed for run in arm.runs] for arm in sweep.arms] == [[0, 1], [0, 1]]
    assert sweep.arms[1].overrides == ("model/attention=mla",)
    assert read(tmp_path, baseline="mla").baseline == 1
    assert find(read(tmp_path, metric="test/loss")).arms[0].values == {0: 2.01, 1: 2.11}
    resumed = tmp_path / "1" / ".hydra" / "overrides.yaml"
    resumed.write_text(f"{resumed.read_text()}- ckpt_path={tmp_path / '1' / 'checkpoints' / 'last.ckpt'}\n")
    monkeypatch.chdir(tmp_path)
    sweep = read(Path("."))
    assert [len(arm.runs) for arm in sweep.arms] == [2, 2] and sweep.name == tmp_path.name


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        (["model/attention=mha model.ffn.d_ff=64", "model/attention=mla model.ffn.d_ff=64"], ["mha", "mla"]),
        (["a/b=x b.c=1", "a/b=y b.c=1", "a/b=y b.c=2"], ["b=x c=1", "b=y c=1", "b=y c=2"]),
        (
            ["m.ffn.d=1 m.experts.d=2", "m.ffn.d=2 m.experts.d=1"],
            ["m.ffn.d=1 m.experts.d=2", "m.ffn.d=2 m.experts.d=1"],
        ),
        (["seed=1", "seed=2"], ["as configured"]),
    ],
)
def test_arms_are_named_by_what_differs(jobs, names, tmp_path):
    for i, overrides in enumerate(jobs):
        write_job(tmp_path, i, overrides.split(), completed(2.0 + i / 10))
    findings = find(read(tmp_path))
    assert [arm.name for arm in findings.arms] == names
    measured = words.measured(findings.baseline, findings)
    assert "± " in measured and "(2 seeds)" in measured if len(names) == 1 else findings.others


def test_plan_without_arms_is_read_by_its_overrides(tmp_path):
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    jobs = [{"job": i, "overrides": [f"model/attention={a}"]} for i, a in enumerate(("mha", "mla", "gqa"))]
    plan = {"kind": "grid", "name": 7, "command": "", "metric": "val/loss", "direction": "minimize", "jobs": jobs}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    findings = find(read(tmp_path))
    assert findings.sweep.name == "7"  # as of task_name=7
    assert [f.name for f in findings.arms] == ["mha", "mla", "gqa"]
    waiting = findings.arms[2]
    assert waiting.runs[0].folder is None and findings.why_lost(waiting.runs[0]) == "unfinished: has not begun"
    assert verdict(waiting, findings).why == "unfinished"
    assert words.state(findings).startswith("Not finished: 1 of 3 runs have no result yet.")


def test_aim_of_a_sweep_without_a_plan_is_in_its_configuration(tmp_path):
    grid(tmp_path, TWO)
    sweeper = {"_target_": "hydra_plugins.optuna.Sweeper", "direction": "minimize"}
    written = {"optimized_metric": "test/loss", "hydra": {"sweeper": sweeper}}
    (tmp_path / "multirun.yaml").write_text(json.dumps(written))
    sweep = read(tmp_path)
    assert (sweep.metric, sweep.maximize, sweep.kind) == ("test/loss", False, "search")
    (tmp_path / "multirun.yaml").write_text("{half: [")
    assert read(tmp_path).metric == "val/loss"


def test_damaged_results_are_one_lost_run(tmp_path):
    grid(tmp_path, {**TWO, "gqa": [2.0, math.nan]})
    write_job(tmp_path, 6, ["model/attention=mha", "seed=4"], {"status": "completed", "metrics": {}})
    for text in ("{half", "[]", '{"metrics": 3}', ""):
        (tmp_path / "1" / "results.json").write_text(text)
        (tmp_path / "2" / "curves.json").write_text(text)
        findings = find(read(tmp_path))
        lost = {run.job: findings.why_lost(run) for run in findings.lost}
        assert lost[1] == "unreadable: its results.json cannot be read" and len(lost) == 3
        assert lost[5] == "diverged: its val/loss is nan" and lost[6] == "logged no val/loss"
        assert findings.arms[1].values == {0: 1.9, 1: 2.0} and findings.arms[1].speed_up is None


CURVES = [{"val": None}, {"val": [[1, None], [2, 2.0]]}, {"val": [3]}, {"tokens_per_step": "x"}, {"expert_load": None}]


def test_curves_and_losses_that_no_run_writes_cost_a_chart_and_not_the_report(tmp_path):
    file = grid(tmp_path, {"mha": [1e200, 2.1], "mla": [1.9, 1.95]}) / "0" / "curves.json"
    curves = json.loads(file.read_text())
    for damage in CURVES:
        file.write_text(json.dumps({**curves, **damage}))
        findings = find(read(tmp_path))
        assert build.write(findings).is_file() and "5e+199 ±" in words.measured(findings.arms[0], findings)


def test_baseline_that_is_lost_and_arms_without_a_seed_in_common_are_not_compared(tmp_path):
    findings = find(read(grid(tmp_path / "lost", {"mha": [None], "mla": [1.9], "gqa": [2.0]})))
    assert words.state(findings).startswith("The baseline mha has no figure, so nothing is compared")
    assert verdict(findings.arms[1], findings).text == "No verdict: mha has no result yet."
    findings = find(read(grid(tmp_path / "apart", {"mha": [math.nan, 2.0], "mla": [1.9, math.nan]})))
    assert verdict(findings.arms[1], findings).why == "no_common_seed" and method(findings) == ""


def test_trials_of_a_search_are_not_tested_against_each_other(tmp_path):
    grid(tmp_path, {"0.1": [2.0, 2.1], "0.2": [1.0, 1.2]}, key="optimizer.lr")
    assert find(read(tmp_path)).comparisons == 1
    (tmp_path / "plan.json").write_text(json.dumps({"kind": "search", "name": "s", "metric": "val/loss"}))
    findings = find(read(tmp_path))
    assert len(findings.arms) == 2 and not findings.comparisons
    assert all(f.comparison is None for f in findings.arms)


@pytest.mark.parametrize(("metric", "kind"), [("speed/tokens_per_second", "better"), ("test/loss", "worse")])
def test_another_metric_has_its_own_direction(metric, kind, tmp_path):
    plan = {"kind": "grid", "metric": "val/bits", "direction": "minimize" if "speed" in metric else "maximize"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for i, (arm, figure) in enumerate(
        (arm, f + f * s / 100) for arm, f in (("mha", 1.0), ("mla", 9.0)) for s in range(3)
    ):
        results = {**completed(2.0), "metrics": {metric: figure}, "figures": described([metric])}
        write_job(tmp_path, i, [f"model/attention={arm}", f"seed={i % 3}"], results)
    findings = find(read(tmp_path, metric=metric))
    assert verdict(findings.arms[1], findings).kind == kind
