"""The table of a sweep: a row for each job, failures with their reason, the best one marked. Whole sweeps:
tests/test_sweeps.py."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from sweep_folder import described

from blockwright.lab.sweep.callback import SweepCallback
from blockwright.lab.sweep.plan import write
from blockwright.lab.sweep.table import _cell, best_of, rows_of, summarise, table_of
from blockwright.training.result import record_failure


def job(sweep: Path, number: int, overrides: list[str], **results: Any) -> Path:
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def done(loss: float, **more: Any) -> dict[str, Any]:
    metrics = {"val/loss": loss, "val/bits_per_byte": loss / 2, "speed/tokens_per_second": 1234.5, **more}
    numbers = {"parameters": 2_500_000, "active_parameters": 900}
    of = described(metrics, read_exact="more")
    return {"status": "completed", **numbers, "metrics": metrics, "figures": of}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    common = ["seed=1", "trainer.max_steps=6"]
    for i, (name, loss) in enumerate({"mqa": float("nan"), "mha": 3.0, "gqa": 2.5}.items()):
        job(tmp_path, i, [*common, f"model/attention={name}"], **done(loss))
    record_failure(job(tmp_path, 3, [*common, "model/attention=mla"]), "RuntimeError: no, it said,\nand broke")
    job(tmp_path, 10, [*common, "model/attention=new"])
    (tmp_path / "logs").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    return tmp_path


def test_each_job_is_a_row_with_what_distinguishes_it(sweep: Path) -> None:
    rows = summarise(sweep)
    assert [row["job"] for row in rows] == [0, 1, 2, 3, 10]
    assert [row["overrides"] for row in rows] == [f"model/attention={n}" for n in ("mqa", "mha", "gqa", "mla", "new")]
    assert [row["status"] for row in rows] == ["completed"] * 3 + ["failed", "unfinished"]
    assert rows[3]["reason"] == "RuntimeError: no, it said,\nand broke" and rows[4]["reason"] == "no results.json"


def test_summary_is_a_csv_that_reads_back(sweep: Path) -> None:
    rows = summarise(sweep)
    with (sweep / "summary.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["reason"] for row in written] == [row["reason"] for row in rows]
    assert [row["val/loss"] for row in written] == ["nan", "3.0", "2.5", "", ""]
    assert written[0]["parameters"] == "2500000" and written[0]["test/loss"] == ""


def test_best_row_is_marked_and_a_diverged_one_never_is(sweep: Path) -> None:
    styles = [str(row.style) for row in table_of(summarise(sweep), "", best_of(sweep, {})).rows]
    assert styles == ["", "", "bold green", "red", "red"]


def test_best_row_is_that_of_the_metric_which_has_a_column(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metric = "pictures/read_exact"
    for i, (loss, right) in enumerate([(2.0, 0.25), (3.0, 0.75)]):
        (sweep / str(i) / "results.json").write_text(json.dumps(done(loss, **{metric: right})))
    plan = {"kind": "grid", "metric": metric, "direction": "maximize", "command": "", "cwd": ".", "workers": 1}
    (sweep / "plan.json").write_text(json.dumps(plan | {"jobs": []}))
    rows = summarise(sweep)
    assert [row[metric] for row in rows] == [0.25, 0.75, None, None, None]
    assert [str(row.style) for row in table_of(rows, "", best_of(sweep, plan)).rows][:3] == ["", "bold green", ""]
    assert metric in capsys.readouterr().out


@pytest.mark.parametrize("losses", [[float("nan")], [float("nan"), float("inf")]])
def test_table_of_nothing_but_diverged_jobs_marks_none(tmp_path: Path, losses: list[float]) -> None:
    for i, loss in enumerate(losses):
        job(tmp_path, i, [f"seed={i}"], **done(loss))
    assert {str(row.style) for row in table_of(summarise(tmp_path), "", best_of(tmp_path, {})).rows} == {""}


def test_table_fits_a_narrow_terminal_and_names_reasons(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows, terminal = summarise(sweep), StringIO()
    Console(file=terminal, width=80).print(table_of(rows, "5 jobs", None))
    piped = capsys.readouterr().out
    assert max(map(len, terminal.getvalue().splitlines())) <= 80
    for said in (piped, terminal.getvalue()):
        assert "5 jobs" in said and "job 3: RuntimeError: no, it said," in said and "job 10: no results.json" in said
        assert "model/attention=gqa" in said and "2.5000" in said
    assert f"{sweep}/summary.csv" in piped


def test_one_job_shows_all_of_its_overrides(tmp_path: Path) -> None:
    job(tmp_path, 0, ["seed=1"], **done(1.0))
    assert summarise(tmp_path)[0]["overrides"] == "seed=1"


def test_job_of_an_ablation_is_called_by_its_arm(tmp_path: Path) -> None:
    jobs = [
        {"job": i, "overrides": ["model/attention=mla", f"seed={i}"], "arm": "mla", "seed": i, "lr": lr}
        for i, lr in enumerate((None, 0.01))
    ]
    write(tmp_path, {"kind": "ablation", "metric": "val/loss", "direction": "minimize", "jobs": jobs})
    rows = rows_of(tmp_path)
    assert [row["name"] for row in rows] == ["mla seed=0", "mla seed=1 lr=0.01"]
    assert [column.header for column in table_of(rows, "", None).columns][:2] == ["job", "arm"]


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_sweep_without_jobs_is_no_trouble(tmp_path: Path, folder: str) -> None:
    assert summarise(tmp_path / folder) == []
    assert not (tmp_path / "summary.csv").exists()


def test_failure_keeps_the_figures_that_were_there(tmp_path: Path) -> None:
    folder = job(tmp_path, 0, ["seed=1"], **done(1.5))
    record_failure(folder, "optimized_metric = 'x': no such value was logged")
    (row,) = summarise(tmp_path)
    assert row["status"] == "failed" and row["val/loss"] == 1.5 and "no such value" in row["reason"]
    record_failure(tmp_path / "made", "why")
    assert json.loads((tmp_path / "made" / "results.json").read_text()) == {"status": "failed", "reason": "why"}


def test_hydra_calls_it_when_a_sweep_ends(sweep: Path) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
    SweepCallback().on_multirun_end(config=config)
    assert (sweep / "summary.csv").is_file()


@pytest.mark.parametrize(
    ("value", "how", "shown"),
    [
        (None, ".4f", ""),
        (1.23456, ".4f", "1.2346"),
        (900, "short", "900"),
        (15_700, "short", "15.70K"),
        (2_400_000_000, "short", "2.40B"),
    ],
)
def test_numbers_are_short(value: Any, how: str, shown: str) -> None:
    assert _cell(value, how) == shown


def test_what_looks_like_markup_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path, 0, ["trainer=[fsdp,sim]"], **done(2.0))
    record_failure(job(tmp_path, 1, ["trainer=ddp"]), "OSError: nothing at [/tmp/x]")
    summarise(tmp_path)
    said = capsys.readouterr().out
    assert "trainer=[fsdp,sim]" in said and "OSError: nothing at [/tmp/x]" in said
