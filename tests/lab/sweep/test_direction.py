"""Which way a sweep's figure is better: by its runs and its plan, which a hand may have changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import write_job

from blockwright.lab.report import build
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import verdict
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.progress import ended_line
from blockwright.lab.sweep.table import best_of
from blockwright.registry import ConfigError

METRIC = "val/reward"


def folder_of(
    sweep: Path, better: str | None = "more", direction: str | None = "maximize", metric: str = METRIC
) -> Path:
    """Two arms at two rates: at its best rate ``b`` has .9 and ``a`` .8, at their worst it is the other way."""
    jobs: list[dict[str, Any]] = []
    for arm, rates in (("a", {1e-9: 0.2, 1e-2: 0.8}), ("b", {1e-9: 0.1, 1e-2: 0.9})):
        for lr, value in rates.items():
            for seed in range(3):
                job = {"job": len(jobs), "overrides": [f"arm={arm}"], "arm": arm, "seed": seed, "lr": lr}
                figures = {} if better == "unknown" else {metric: {"unit": "a sampled completion", "better": better}}
                results = {"status": "completed", "metrics": {metric: value + seed / 1000}, "figures": figures}
                write_job(sweep, len(jobs), job["overrides"], results)
                jobs.append(job)
    arms = [{"name": name, "overrides": [f"arm={name}"], "baseline": name == "a"} for name in "ab"]
    plan = {"kind": "ablation", "name": "x", "command": "", "metric": metric, "jobs": jobs, "arms": arms, "workers": 1}
    (sweep / plans.PLAN).write_text(json.dumps(plan | ({} if direction is None else {"direction": direction})))
    return sweep


def test_arms_are_compared_at_the_rates_at_which_they_earn_most(tmp_path: Path) -> None:
    findings = find(read(folder_of(tmp_path)))
    assert [f.lr for f in findings.arms] == [1e-2, 1e-2]
    assert findings.arms[1].comparison is not None and findings.arms[1].comparison.difference.mean == pytest.approx(0.1)
    assert verdict(findings.arms[1], findings).why == "untuned"  # there may be more beyond the rates that were tried
    page = build.write(findings).read_text()
    assert "more is better" in page and f"{METRIC} ↑" in page and f"{METRIC} in a sampled completion" in page


def test_best_job_is_that_of_most_reward(tmp_path: Path) -> None:
    plan = plans.read(folder_of(tmp_path))
    assert best_of(tmp_path, plan) == (11, 0.902)
    assert "best 0.9020 (job 11)" in ended_line(tmp_path, plan, 0, 1)


def test_of_a_tie_the_first_job_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the folder lists them."""
    plan, listed = plans.read(folder_of(tmp_path)), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    for job in (2, 9, 10):
        file = tmp_path / str(job) / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {METRIC: 0.95}}))
    assert best_of(tmp_path, plan) == (2, 0.95)


@pytest.mark.parametrize("written", ["minimize", "Maximize", "up", 3, None])
def test_plan_that_a_hand_has_turned_round_is_refused(tmp_path: Path, written: Any) -> None:
    folder_of(tmp_path)
    (tmp_path / plans.PLAN).write_text(
        json.dumps(json.loads((tmp_path / plans.PLAN).read_text()) | {"direction": written})
    )
    with pytest.raises(ConfigError, match=r"contradicts val/reward|must be one of minimize, maximize"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"contradicts val/reward|must be one of minimize, maximize"):
        best_of(tmp_path, plans.read(tmp_path))


def test_runs_that_disagree_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path)
    file = tmp_path / "4" / "results.json"
    file.write_text(file.read_text().replace("more", "less"))
    with pytest.raises(ConfigError, match="disagree on val/reward: more is better, and less is"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="disagree"):
        best_of(tmp_path, plans.read(tmp_path))


def test_figure_that_has_no_direction_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither better nor worse where it is more"):
        read(folder_of(tmp_path, better=None))


def test_figure_of_a_plug_in_that_is_not_there_has_the_direction_of_its_runs(tmp_path: Path) -> None:
    sweep = read(folder_of(tmp_path, direction=None, metric="val/of_a_plug_in"))
    assert sweep.maximize and sweep.unit == "a sampled completion"


def test_figure_that_no_run_describes_has_the_direction_that_is_asked_for(tmp_path: Path) -> None:
    folder_of(tmp_path, better="unknown", direction=None)
    with pytest.raises(ConfigError, match=r"which way is better is not known.*write --direction=maximize"):
        read(tmp_path)
    assert read(tmp_path, direction="maximize").maximize and not read(tmp_path, direction="minimize").maximize
    with pytest.raises(ConfigError, match="Did you mean 'maximize'"):
        read(tmp_path, direction="maximise")


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_direction_that_is_asked_for_never_turns_a_figure_round(tmp_path: Path, direction: str) -> None:
    folder_of(tmp_path)
    if direction == "maximize":
        assert read(tmp_path, direction=direction).maximize
        return
    with pytest.raises(ConfigError, match="contradicts val/reward, of which more is better") as caught:
        read(tmp_path, direction=direction)
    assert caught.value.path == "--direction"


@pytest.mark.parametrize("figures", [3, [], {"val/reward": 3}, {"val/reward": {"unit": 3, "better": "more"}},
                                     {"val/reward": {"unit": "x" * 61, "better": "more"}},
                                     {"val/reward": {"unit": "\x1b[31m", "better": "more"}},
                                     {"val/reward": {"unit": "", "better": "up"}},
                                     {"val/reward": {"unit": ""}}])  # fmt: skip
def test_description_that_no_run_writes_counts_as_none(tmp_path: Path, figures: Any) -> None:
    folder_of(tmp_path, better="unknown")
    file = tmp_path / "0" / "results.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "figures": figures}))
    sweep = read(tmp_path)
    assert sweep.maximize and sweep.unit == ""  # by the plan
