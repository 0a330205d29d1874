"""What lies in a sweep's folder: with a plan and without, whole, half-finished and damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import ablation, completed, described, grid, write_job

from blockwright.lab.report import build, words
from blockwright.lab.report.findings import find
from blockwright.lab.report.method import method
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import verdict


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ablation(tmp_path_factory.mktemp("ablation"))


def test_plan_names_arms_and_baseline(planned: Path) -> None:
    sweep = read(planned)
    assert [arm.name for arm in sweep.arms] == ["mha", "gqa", "mla", "moe", "broken <b>&"]
    assert (sweep.kind, sweep.name, sweep.metric, sweep.maximize) == ("ablation", "attention", "val/loss", False)
    assert sweep.arms[sweep.baseline].name == "mha"
    assert [run.job for run in sweep.arms[2].runs] == [6, 7, 8] and [r.seed for r in sweep.arms[2].runs] == [0, 1, 2]
    assert sweep.arms[2].match is not None and sweep.arms[2].match["residual"]["cache_bytes"] == 144 / 512 - 1


def test_lost_runs_have_their_reasons(planned: Path) -> None:
    findings = find(read(planned))
    told = {run.job: findings.why_lost(run) for run in findings.lost}
    assert told.keys() == {5, 12, 13, 14}
    assert told[5] == "diverged: diverged at step 57: its loss is nan" and "ConfigError" in told[12]
    broken = findings.arms[4]
    assert broken.interval is None
    assert verdict(broken, findings).text.startswith("No verdict: broken <b>& is lost: 3 of 3 runs")
    gqa = findings.arms[1]
    assert gqa.comparison is not None and gqa.comparison.by_seed.keys() == {0, 1}
    assert verdict(gqa, findings).why == "lost_seeds" and "(1 diverged)" in verdict(gqa, findings).text


def test_figures_are_those_of_the_runs_and_else_of_the_plan(planned: Path) -> None:
    findings = find(read(planned))
    assert findings.arms[2].figures["params"] == 1_020_000 and findings.arms[2].figures["cache_bytes"] == 144
    assert findings.arms[4].figures["params"] == 1_000_000  # never ran


def test_without_a_plan_runs_that_differ_in_the_seed_are_one_arm(tmp_path: Path) -> None:
    sweep = read(grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, 2.0]}))
    assert [arm.name for arm in sweep.arms] == ["mha", "mla"] and sweep.baseline == 0
    assert [[run.seed for run in arm.runs] for arm in sweep.arms] == [[0, 1], [0, 1]]
    assert sweep.arms[1].overrides == ("model/attention=mla",)
    assert read(tmp_path, baseline="mla").baseline == 1
    assert find(read(tmp_path, metric="test/loss")).arms[0].values == {0: 2.01, 1: 2.11}


def test_arms_of_two_keys_name_both(tmp_path: Path) -> None:
    for i, (attention, d_ff) in enumerate([("mha", 64), ("mla", 64), ("mla", 128)]):
        write_job(tmp_path, i, [f"model/attention={attention}", f"model.ffn.d_ff={d_ff}", "seed=3"], completed(2.0))
    sweep = read(tmp_path)
    assert [arm.name for arm in sweep.arms] == [
        "attention=mha d_ff=64",
        "attention=mla d_ff=64",
        "attention=mla d_ff=128",
    ]
    assert {run.seed for run in sweep.runs} == {3}


def test_keys_that_end_alike_are_written_out(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["model.ffn.d_ff=1", "model.experts.d_ff=2"], completed(2.0))
    write_job(tmp_path, 1, ["model.ffn.d_ff=2", "model.experts.d_ff=1"], completed(2.0))
    assert read(tmp_path).arms[0].name == "model.ffn.d_ff=1 model.experts.d_ff=2"


def test_sweep_of_seeds_alone_is_one_arm(tmp_path: Path) -> None:
    findings = find(read(grid(tmp_path, {"mha": [2.0, 2.1, 2.2]})))
    assert [f.name for f in findings.arms] == ["as configured"] and not findings.others
    assert (
        words.measured(findings.baseline, findings) == "as configured: val/loss 2.10 ± 0.25 nats per token (3 seeds)."
    )


def test_plan_without_arms_is_read_by_its_overrides(tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    jobs = [{"job": i, "overrides": [f"model/attention={a}"]} for i, a in enumerate(("mha", "mla", "gqa"))]
    plan = {"kind": "grid", "name": 7, "command": "", "metric": "val/loss", "direction": "minimize", "jobs": jobs}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    findings = find(read(tmp_path))
    assert findings.sweep.name == "7"  # as of task_name=7
    assert [f.name for f in findings.arms] == ["mha", "mla", "gqa"]
    waiting = findings.arms[2]
    assert waiting.runs[0].folder is None and findings.why_lost(waiting.runs[0]) == "unfinished: has not begun"
    assert verdict(waiting, findings).text == "No verdict: gqa has no result yet."
    assert words.state(findings).startswith("Not finished: 1 of 3 runs have no result yet.")


def test_aim_of_a_sweep_without_a_plan_is_in_its_configuration(tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    written = {"optimized_metric": "test/loss", "hydra": {"sweeper": {"_target_": "x.Optuna", "direction": "minimize"}}}
    (tmp_path / "multirun.yaml").write_text(json.dumps(written).replace("x.Optuna", "hydra_plugins.optuna.Sweeper"))
    sweep = read(tmp_path)
    assert (sweep.metric, sweep.maximize, sweep.kind) == ("test/loss", False, "search")
    (tmp_path / "multirun.yaml").write_text("{half: [")
    assert read(tmp_path).metric == "val/loss"


@pytest.mark.parametrize("text", ["{half", "[]", '{"metrics": 3}', ""])
def test_damaged_results_are_one_lost_run(tmp_path: Path, text: str) -> None:
    grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, 2.0]})
    (tmp_path / "1" / "results.json").write_text(text)
    (tmp_path / "2" / "curves.json").write_text(text)
    findings = find(read(tmp_path))
    assert [findings.why_lost(run) for run in findings.lost] == ["unreadable: its results.json cannot be read"]
    assert findings.arms[1].values == {0: 1.9, 1: 2.0} and findings.arms[1].speed_up is None


def test_completed_without_a_number_is_lost(tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0, 2.0, 2.0]})
    write_job(tmp_path, 3, ["seed=3"], completed(math.nan))
    write_job(tmp_path, 4, ["seed=4"], {"status": "completed", "metrics": {}})
    findings = find(read(tmp_path))
    assert [findings.why_lost(run) for run in findings.lost] == ["diverged: its val/loss is nan", "logged no val/loss"]


def test_baseline_that_is_lost_is_said_to_be(tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [None], "mla": [1.9], "gqa": [2.0]})
    findings = find(read(tmp_path))
    assert words.state(findings).startswith("The baseline mha has no figure, so nothing is compared")
    assert verdict(findings.arms[1], findings).text == "No verdict: mha has no result yet."


def test_speed_up_is_over_common_seeds(planned: Path) -> None:
    findings = find(read(planned))
    mla = findings.arms[2].speed_up
    assert mla is not None and mla.n == 3 and 1.0 < mla.mean < 1.5
    assert findings.baseline.speed_up is None and findings.arms[4].speed_up is None
    gqa = findings.arms[1].speed_up
    assert gqa is not None and gqa.n == 2


def test_trials_of_a_search_are_not_tested_against_each_other(tmp_path: Path) -> None:
    grid(tmp_path, {"0.1": [2.0, 2.1], "0.2": [1.0, 1.2]}, key="optimizer.lr")
    assert find(read(tmp_path)).comparisons == 1
    (tmp_path / "plan.json").write_text(json.dumps({"kind": "search", "name": "s", "metric": "val/loss"}))
    findings = find(read(tmp_path))
    assert len(findings.arms) == 2 and not findings.comparisons
    assert all(f.comparison is None for f in findings.arms)


@pytest.mark.parametrize(
    "damage",
    [{"val": None}, {"val": [[1, None], [2, 2.0]]}, {"val": [3]}, {"tokens_per_step": "x"}, {"expert_load": None}],
    ids=str,
)
def test_curves_that_no_run_writes_cost_a_chart_and_not_the_report(damage: dict[str, Any], tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, 1.8]})
    file = tmp_path / "0" / "curves.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    assert build.write(find(read(tmp_path))).is_file()


@pytest.mark.parametrize(("metric", "better"), [("speed/tokens_per_second", "mla"), ("test/loss", "mha")])
def test_another_metric_has_its_own_direction(metric: str, better: str, tmp_path: Path) -> None:
    """And not that of the plan."""
    plan = {"kind": "grid", "metric": "val/bits", "direction": "minimize" if "speed" in metric else "maximize"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for i, (arm, figure) in enumerate((arm, f + s / 100) for arm, f in (("mha", 1.0), ("mla", 9.0)) for s in range(3)):
        results = {**completed(2.0), "metrics": {metric: figure}, "figures": described([metric])}
        write_job(tmp_path, i, [f"model/attention={arm}", f"seed={i % 3}"], results)
    findings = find(read(tmp_path, metric=metric))
    assert verdict(findings.arms[1], findings).kind == ("better" if better == "mla" else "worse")


def test_arm_without_a_seed_in_common_is_not_called_one_seed(tmp_path: Path) -> None:
    findings = find(read(grid(tmp_path, {"mha": [math.nan, 2.0], "mla": [1.9, math.nan]})))
    assert verdict(findings.arms[1], findings).why == "no_common_seed"
    assert method(findings) == ""


def test_losses_beyond_all_measure_are_reported(tmp_path: Path) -> None:
    findings = find(read(grid(tmp_path, {"mha": [1e200, 2.1], "mla": [1.9, 1.95]})))
    assert "5e+199 ±" in words.measured(findings.arms[0], findings)
    build.write(findings)


def test_folder_named_by_a_dot_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grid(tmp_path, {"mha": [2.0], "mla": [1.9]}))
    assert read(Path(".")).name == tmp_path.name


def test_job_that_was_resumed_is_of_the_arm_that_it_was_begun_for(tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, 2.0]})
    resumed = tmp_path / "1" / ".hydra" / "overrides.yaml"
    checkpoint = tmp_path / "1" / "checkpoints" / "last.ckpt"
    resumed.write_text(f"{resumed.read_text()}- ckpt_path={checkpoint}\n")
    assert [len(arm.runs) for arm in read(tmp_path).arms] == [2, 2]
