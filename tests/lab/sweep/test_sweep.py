"""The table of a sweep: a row for each job, failures with their reason, the best one marked. Whole sweeps:
tests/test_sweeps.py."""

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from sweep_folder import described, write_job

from blockwright.lab.report import build
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.verdict import verdict
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.callback import SweepCallback
from blockwright.lab.sweep.plan import write
from blockwright.lab.sweep.table import best_of, ended_line, rows_of, summarise, table_of
from blockwright.registry import ConfigError
from blockwright.training.result import record_failure


def job(sweep, number, overrides, **results):
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def done(loss, **more):
    metrics = {"val/loss": loss, "val/bits_per_byte": loss / 2, "speed/tokens_per_second": 1234.5, **more}
    numbers = {"parameters": 2_500_000, "active_parameters": 900}
    of = described(metrics, read_exact="more")
    return {"status": "completed", **numbers, "metrics": metrics, "figures": of}


@pytest.fixture
def sweep(tmp_path):
    common = ["seed=1", "trainer.max_steps=6"]
    for i, (name, loss) in enumerate({"mqa": float("nan"), "mha": 3.0, "gqa": 2.5}.items()):
        job(tmp_path, i, [*common, f"model/attention={name}"], **done(loss))
    record_failure(job(tmp_path, 3, [*common, "model/attention=mla"]), "RuntimeError: no, it said,\nand broke")
    job(tmp_path, 10, [*common, "model/attention=new"])
    (tmp_path / "logs").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    return tmp_path


def styles(rows, best):
    return [str(row.style) for row in table_of(rows, "", best).rows]


def test_each_job_is_a_row_with_what_distinguishes_it_and_the_best_is_marked(sweep):
    rows = summarise(sweep)
    assert [row["job"] for row in rows] == [0, 1, 2, 3, 10]
    assert [row["overrides"] for row in rows] == [f"model/attention={n}" for n in ("mqa", "mha", "gqa", "mla", "new")]
    assert [row["status"] for row in rows] == ["completed"] * 3 + ["failed", "unfinished"]
    assert rows[3]["reason"] == "RuntimeError: no, it said,\nand broke" and rows[4]["reason"] == "no results.json"
    assert styles(rows, best_of(sweep, {})) == ["", "", "bold green", "red", "red"]  # never one that diverged
    (sweep / "summary.csv").unlink()
    SweepCallback().on_multirun_end(config=OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    with (sweep / "summary.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["reason"] for row in written] == [row["reason"] for row in rows]
    assert [row["val/loss"] for row in written] == ["nan", "3.0", "2.5", "", ""]
    assert written[0]["parameters"] == "2500000" and written[0]["test/loss"] == ""


def test_best_row_is_that_of_the_metric_which_has_a_column(sweep):
    metric = "pictures/read_exact"
    for i, (loss, right) in enumerate([(2.0, 0.25), (3.0, 0.75)]):
        (sweep / str(i) / "results.json").write_text(json.dumps(done(loss, **{metric: right})))
    plan = {"kind": "grid", "metric": metric, "direction": "maximize", "command": "", "cwd": ".", "workers": 1}
    (sweep / "plan.json").write_text(json.dumps(plan | {"jobs": []}))
    rows = summarise(sweep)
    assert [row[metric] for row in rows] == [0.25, 0.75, None, None, None]
    assert styles(rows, best_of(sweep, plan))[:3] == ["", "bold green", ""]


def test_table_of_nothing_but_diverged_jobs_or_of_none_marks_none(tmp_path):
    assert summarise(tmp_path) == summarise(tmp_path / "nowhere") == [] and not (tmp_path / "summary.csv").exists()
    for i, loss in enumerate((float("nan"), float("inf"))):
        job(tmp_path, i, [f"seed={i}"], **done(loss))
        assert set(styles(summarise(tmp_path), best_of(tmp_path, {}))) == {""}


def test_table_fits_a_narrow_terminal_and_shows_markup_as_it_is(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    job(sweep, 11, ["trainer=[fsdp,sim]"], **done(2.0))
    record_failure(job(sweep, 12, ["trainer=ddp"]), "OSError: nothing at [/tmp/x]")
    rows, terminal = summarise(sweep), StringIO()
    Console(file=terminal, width=80).print(table_of(rows, "7 jobs", None))
    piped = capsys.readouterr().out
    assert max(map(len, terminal.getvalue().splitlines())) <= 80
    for said in (piped, terminal.getvalue()):
        assert "job 3: RuntimeError: no, it said," in said and "job 10: no results.json" in said
        assert "trainer=[fsdp,sim]" in said and "OSError: nothing at [/tmp/x]" in said and "2.5000" in said
    assert f"{sweep}/summary.csv" in piped


def test_jobs_of_an_ablation_are_called_by_their_arm_and_failures_keep_their_figures(tmp_path):
    of = {"arm": "mla", "overrides": []}
    jobs = [{**of, "job": i, "seed": i, "lr": lr} for i, lr in enumerate((None, 0.01))]
    write(tmp_path, {"kind": "ablation", "metric": "val/loss", "direction": "minimize", "jobs": jobs})
    rows = rows_of(tmp_path)
    assert [row["name"] for row in rows] == ["mla seed=0", "mla seed=1 lr=0.01"]
    assert [column.header for column in table_of(rows, "", None).columns][:2] == ["job", "arm"]
    folder = job(tmp_path / "alone", 0, ["seed=1"], **done(1.5))
    record_failure(folder, "optimized_metric = 'x': no such value was logged")
    (row,) = summarise(tmp_path / "alone")
    assert row["status"] == "failed" and row["val/loss"] == 1.5 and row["overrides"] == "seed=1"
    record_failure(tmp_path / "made", "why")
    assert json.loads((tmp_path / "made" / "results.json").read_text()) == {"status": "failed", "reason": "why"}


METRIC = "val/reward"


def folder_of(sweep, better="more", direction="maximize", metric=METRIC):
    """Two arms at two rates: at its best rate ``b`` has .9 and ``a`` .8, at their worst it is the other way."""
    jobs = []
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


def test_arms_are_compared_at_the_rates_at_which_they_earn_most(tmp_path):
    findings = find(read(folder_of(tmp_path)))
    assert [f.lr for f in findings.arms] == [1e-2, 1e-2]
    assert findings.arms[1].comparison is not None and findings.arms[1].comparison.difference.mean == pytest.approx(0.1)
    assert verdict(findings.arms[1], findings).why == "untuned"  # there may be more beyond the rates that were tried
    page = build.write(findings).read_text()
    assert "more is better" in page and f"{METRIC} ↑" in page and f"{METRIC} in a sampled completion" in page


def test_best_job_is_that_of_most_reward(tmp_path):
    plan = plans.read(folder_of(tmp_path))
    assert best_of(tmp_path, plan) == (11, 0.902)
    assert "best 0.9020 (job 11)" in ended_line(tmp_path, plan, 0, 1)


def test_of_a_tie_the_first_job_is_the_best(tmp_path, monkeypatch):
    plan, listed = plans.read(folder_of(tmp_path)), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    for job in (2, 9, 10):
        file = tmp_path / str(job) / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {METRIC: 0.95}}))
    assert best_of(tmp_path, plan) == (2, 0.95)


def test_plan_or_run_that_a_hand_has_turned_round_is_refused(tmp_path):
    folder_of(tmp_path)
    file, plan = tmp_path / "4" / "results.json", json.loads((tmp_path / plans.PLAN).read_text())
    for written in ("minimize", "Maximize", "up", 3, None):
        (tmp_path / plans.PLAN).write_text(json.dumps(plan | {"direction": written}))
        for see in (read, lambda folder: best_of(folder, plans.read(folder))):
            with pytest.raises(ConfigError, match=r"contradicts val/reward|must be one of minimize, maximize"):
                see(tmp_path)
    (tmp_path / plans.PLAN).write_text(json.dumps(plan))
    file.write_text(file.read_text().replace("more", "less"))
    for see in (read, lambda folder: best_of(folder, plans.read(folder))):
        with pytest.raises(ConfigError, match="disagree"):
            see(tmp_path)


def test_figure_that_has_no_direction_is_no_target(tmp_path):
    with pytest.raises(ConfigError, match="is neither better nor worse where it is more"):
        read(folder_of(tmp_path, better=None))


def test_figure_of_a_plug_in_that_is_not_there_has_the_direction_of_its_runs(tmp_path):
    sweep = read(folder_of(tmp_path, direction=None, metric="val/of_a_plug_in"))
    assert sweep.maximize and sweep.unit == "a sampled completion"


def test_figure_that_no_run_describes_has_the_direction_that_is_asked_for(tmp_path):
    folder_of(tmp_path, better="unknown", direction=None)
    with pytest.raises(ConfigError, match=r"which way is better is not known.*write --direction=maximize"):
        read(tmp_path)
    assert read(tmp_path, direction="maximize").maximize and not read(tmp_path, direction="minimize").maximize
    with pytest.raises(ConfigError, match="Did you mean 'maximize'"):
        read(tmp_path, direction="maximise")


def test_direction_that_is_asked_for_never_turns_a_figure_round(tmp_path):
    folder_of(tmp_path)
    assert read(tmp_path, direction="maximize").maximize
    with pytest.raises(ConfigError, match="contradicts val/reward") as caught:
        read(tmp_path, direction="minimize")
    assert caught.value.path == "--direction"


UNITS = [{"unit": unit, "better": "more"} for unit in (3, "x" * 61, "\x1b[31m")]


def test_description_that_no_run_writes_counts_as_none(tmp_path):
    folder_of(tmp_path, better="unknown")
    file = tmp_path / "0" / "results.json"
    results = json.loads(file.read_text())
    for figures in (3, [], *({METRIC: each} for each in (3, *UNITS, {"unit": "", "better": "up"}, {"unit": ""}))):
        file.write_text(json.dumps({**results, "figures": figures}))
        sweep = read(tmp_path)
        assert sweep.maximize and sweep.unit == ""  # by the plan
