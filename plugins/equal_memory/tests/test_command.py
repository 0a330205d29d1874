"""``blockwright throughput`` as a command: what it prints, and the report that it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from blockwright.command import run
from blockwright.registry.command import run_command

pytestmark = pytest.mark.xdist_group("throughput")  # its command runs once
SMALL = ["model=tiny", "model/ffn=swiglu", "model.layout=null", "model.variants=null", "model.d_model=64"]
SMALL += ["model.n_layers=2", "model/attention=mha,gqa"]
HOW = ["memory=200kB", "bits=null,6", "context=16,48", "repeats=3", "steps=2"]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The document of ``--json``, and the folder of the report."""
    import contextlib
    import io

    logs, said = tmp_path_factory.mktemp("logs"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_command(run, ["throughput", *SMALL, *HOW, f"paths.log_dir={logs}", "--json"]) == 0
    (folder,) = (logs / "throughput").iterdir()
    return json.loads(said.getvalue()), folder / "report"


@pytest.mark.slow
def test_every_cell_is_as_full_as_it_can_be(answer: tuple[dict[str, Any], Path]) -> None:
    rows = answer[0]["rows"]
    assert len(rows) == 2 * 2 * 2 and {row["arm"] for row in rows} == {"mha", "gqa"}
    for row in rows:
        assert row["rows"] * row["sequence_bytes"] == row["caches_bytes"] <= 200_000
        assert (row["rows"] + 1) * row["sequence_bytes"] > 200_000
        assert len(row["processor_seconds"]) == len(row["wall_seconds"]) == 3
        assert 0 < row["tokens_per_second"]["least"] <= row["tokens_per_second"]["most"]


@pytest.mark.slow
def test_the_planner_fits_as_many_within_5_percent(answer: tuple[dict[str, Any], Path]) -> None:
    for row in answer[0]["rows"]:
        assert abs(row["planner_off"]["rows"]) <= 0.05
        assert 0 < row["planned"]["tokens_per_second"] <= 1.01 * row["roofline_tokens_per_second"]


@pytest.mark.slow
def test_tokens_a_second_are_rows_over_seconds_of_the_processor(answer: tuple[dict[str, Any], Path]) -> None:
    for row in answer[0]["rows"]:
        rates = sorted(row["rows"] / seconds for seconds in row["processor_seconds"])
        assert list(row["tokens_per_second"].values()) == pytest.approx([rates[1], rates[0], rates[2]])


@pytest.mark.slow
def test_bits_save_what_codes_and_scales_say(answer: tuple[dict[str, Any], Path]) -> None:
    bits = [each for each in answer[0]["comparisons"] if each["change"] == "bits"]
    share = (6 + 16 / 8) / 32  # heads of 8 numbers, of which each has a scale in bf16
    assert len(bits) == 4 and all(each["saved"] == pytest.approx(1 - share) for each in bits)
    assert all(each["rows"] == pytest.approx(1 / share, rel=0.2) for each in bits)  # both are whole numbers


@pytest.mark.slow
def test_the_report_says_the_same_as_the_document(answer: tuple[dict[str, Any], Path]) -> None:
    document, report = answer
    assert json.loads((report / "throughput.json").read_text()) == document
    turns = list(csv.DictReader((report / "runs.csv").open()))
    assert len(turns) == len(document["rows"]) * 3
    total = sum(float(turn["processor_seconds"]) for turn in turns)
    assert total == pytest.approx(sum(sum(row["processor_seconds"]) for row in document["rows"]))
    page, text = (report / "index.html").read_text(), (report / "report.md").read_text()
    for heading in ("Architecture at equal bits", "Bits alone", "Architecture and bits", "The paper&#39;s claim"):
        assert heading in page and heading.replace("&#39;", "'") in text
    assert "verdict.json" not in page and 'href="runs.csv"' in page
    charts = {file.stem for file in report.glob("*.svg")}
    assert charts == {"architecture-exact", "architecture-6", "bits-6", "both-6", "speed-exact", "speed-6"}
    for chart in charts:
        assert ET.parse(report / f"{chart}.svg").getroot().iter("{http://www.w3.org/2000/svg}path")


@pytest.mark.slow
def test_one_arm_is_measured_next_to_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL[:-1], "model/attention=kda", "memory=200kB", "context=16", "repeats=1", f"paths.log_dir={tmp_path}"]
    assert run_command(run, ["throughput", *small]) == 0
    said = capsys.readouterr().out
    assert "Full batches" in said and "5.76 ×" in said and "Bits alone" not in said
    assert said.strip().endswith("index.html")


@pytest.mark.slow
def test_rows_are_chosen_for_an_arm_that_remembers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*SMALL[:-1], "model/attention=none,gqa", "memory=1MB", "rows=3", "context=16", "repeats=1"]
    assert run_command(run, ["throughput", *few, f"paths.log_dir={tmp_path}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["rows"], row["planned"]["rows"]) for row in rows] == [(3, 3), (3, 3)]
    assert rows[0]["sequence_bytes"] == 0 < rows[1]["sequence_bytes"]
