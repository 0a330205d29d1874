"""``blockwright throughput``: mistakes, what it prints, and the report that it writes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree as ET

import pytest
import torch

from blockwright.command import run
from blockwright.plugins.equal_memory import answer as answers
from blockwright.plugins.equal_memory.__main__ import main
from blockwright.plugins.equal_memory.request import Settings, read_request
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command

ARMS = ["model=tiny", "model/attention=mha,gqa"]
FEW = [*ARMS, "memory=1MB"]


def test_memory_is_a_number_with_a_unit() -> None:
    sizes = {"64MB": 64_000_000, "64MiB": 2**26, "1.5 GB": 1_500_000_000, "2kb": 2000, "1TiB": 2**40, "8B": 8}
    assert {text: Settings(memory=text).budget for text in sizes} == sizes


def test_arms_are_those_of_a_sweep() -> None:
    request = read_request([*FEW, "bits=null,6", "context=64,256", "baseline=gqa", "paths.log_dir=logs", "--json"])
    assert list(request.arms) == ["mha", "gqa"] and request.arms["gqa"] == ["model=tiny", "model/attention=gqa"]
    assert (request.settings.bits, request.settings.context) == ((None, 6), (64, 256))
    assert request.baseline == "gqa" and request.log_dir == ["paths.log_dir=logs"] and request.as_json


# Options, and values of each that are refused.
WRONG = {"memory": "2MB", "bits": "5 six null,null []", "context": "0 long 64,64 5", "baseline": "mqa", "rows": "0"}
WRONG |= {"repeats": "0 often", "steps": "0", "threads": "0", "dtype": "float31", "device": "tpu meta"}
WRONG |= {"optimizer.lr": "1", "repeat": "3"}
REFUSED: list[tuple[list[str], str]] = [
    *(([*FEW, f"{key}={value}"], key) for key, values in WRONG.items() for value in values.split()),
    *(([*ARMS, f"memory={value}"], "memory") for value in ("64", "0MB", "-1MB", "64XB", "1e3MB", "")),
    *(([], "memory"), (ARMS, "memory"), (["memory=1MB"], "model")),
    ([*FEW, "context=64", "steps=63"], "context"),
    *(([*FEW, "--jsn"], "command line"), ([*FEW, "tiny"], "command line")),
    (["model=tiny", "model/attention=mha,mha", "memory=1MB"], "command line"),
    (["model=tiny", "model/attention=mla,mlaa", "memory=8MB"], "arm mlaa: model/attention"),
    (["model=tiny", "model.attention.n_heads=7", "memory=1MB"], "arm model: model.attention.n_heads"),
    ([*FEW, "context=5000"], "arm mha: context"),
    ([*ARMS, "memory=900TB"], "arm mha: memory"),
    (["model=tiny", "model/attention=none", "memory=1MB"], "arm model: rows"),
    ([*FEW, "context=64", "paths.log_dir=null"], "paths.log_dir"),
    ([*FEW, "context=64", "paths.log_dir=file/logs"], "paths.log_dir"),
]


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for arguments, path in REFUSED:
        with pytest.raises(ConfigError) as refused:
            main(arguments)
        assert refused.value.path == path and refused.value.remedy, arguments
        assert [each.name for each in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="memory=13MB"):
        main([*FEW, "context=2000"])


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory")
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), NO_MEMORY]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt(), RuntimeError("a defect")])
def test_a_measurement_that_ends_early_leaves_no_folder(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "read_arms", lambda *_: [])
    monkeypatch.setattr(answers, "measure", Mock(side_effect=error))
    with pytest.raises(ConfigError if error in OUT_OF_MEMORY else type(error)) as raised:
        main([*FEW, f"paths.log_dir={tmp_path}"])
    assert not list((tmp_path / "throughput").iterdir())
    if error in OUT_OF_MEMORY:
        assert raised.value.path == "memory" and "rows=N" in raised.value.remedy  # type: ignore[attr-defined]


def test_examples_of_the_page_are_command_lines() -> None:
    page = (Path(answers.__file__).parent / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith("blockwright throughput")]
    requests = [read_request(shlex.split(line, comments=True)[2:]) for line in lines]
    assert len(requests) == 4 and all(len(request.arms) > 1 for request in requests)


def test_a_refusal_is_one_message_with_exit_code_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [*FEW, "bits=5"]) == 64
    assert capsys.readouterr().err.count("error: ") == 1
    assert run_command(main, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("blockwright throughput")


pytestmark = pytest.mark.xdist_group("throughput")  # its command runs once
SMALL = ["model=tiny", "model/ffn=swiglu", "model.layout=null", "model.variants=null", "model.d_model=64"]
SMALL += ["model.n_layers=2", "model/attention=mha,gqa"]
Answer = tuple[dict[str, Any], Path]
HOW = ["memory=200kB", "bits=null,6", "context=16,48", "repeats=3", "steps=2"]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """The document of ``--json``, and the folder of the report."""
    logs, said = tmp_path_factory.mktemp("logs"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_command(run, ["throughput", *SMALL, *HOW, f"paths.log_dir={logs}", "--json"]) == 0
    (folder,) = (logs / "throughput").iterdir()
    return json.loads(said.getvalue()), folder / "report"


@pytest.mark.slow
def test_rows_fill_the_memory_agree_with_the_plan_and_are_timed_by_the_processor(answer: Answer) -> None:
    rows = answer[0]["rows"]
    assert len(rows) == 2 * 2 * 2 and {row["arm"] for row in rows} == {"mha", "gqa"}
    for row in rows:
        assert row["rows"] * row["sequence_bytes"] == row["caches_bytes"] <= 200_000
        assert (row["rows"] + 1) * row["sequence_bytes"] > 200_000
        assert len(row["processor_seconds"]) == len(row["wall_seconds"]) == 3
        assert abs(row["planner_off"]["rows"]) <= 0.05
        assert 0 < row["planned"]["tokens_per_second"] <= 1.01 * row["roofline_tokens_per_second"]
        rates = sorted(row["rows"] / seconds for seconds in row["processor_seconds"])
        assert list(row["tokens_per_second"].values()) == pytest.approx([rates[1], rates[0], rates[2]])


@pytest.mark.slow
def test_bits_save_what_codes_and_scales_say(answer: Answer) -> None:
    bits = [each for each in answer[0]["comparisons"] if each["change"] == "bits"]
    share = (6 + 16 / 8) / 32  # heads of 8 numbers, of which each has a scale in bf16
    assert len(bits) == 4 and all(each["saved"] == pytest.approx(1 - share) for each in bits)
    assert all(each["rows"] == pytest.approx(1 / share, rel=0.2) for each in bits)  # both are whole numbers


@pytest.mark.slow
def test_the_report_says_the_same_as_the_document(answer: Answer) -> None:
    document, report = answer
    assert json.loads((report / "throughput.json").read_text()) == document
    turns = list(csv.DictReader((report / "runs.csv").open()))
    assert len(turns) == len(document["rows"]) * 3
    total = sum(float(turn["processor_seconds"]) for turn in turns)
    assert total == pytest.approx(sum(sum(row["processor_seconds"]) for row in document["rows"]))
    page = (report / "index.html").read_text()
    assert "verdict.json" not in page and 'href="runs.csv"' in page and (report / "report.md").exists()
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
