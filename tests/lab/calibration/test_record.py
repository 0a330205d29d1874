"""calibration.json: what it holds, when it still counts, and what a report says of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import ablation

from blockwright.lab.calibration import record
from blockwright.lab.calibration.control import Control
from blockwright.lab.report import build
from blockwright.lab.report.findings import find
from blockwright.lab.report.method import NOT_CALIBRATED, basis
from blockwright.lab.report.reading import read as read_sweep

EFFECT = Control("effect", "a known one", "worse", arms={"b": ("b=2",)}, seeds=(0, 1, 2))
ABSENT = Control("absent", "an absent one", "absent", arms={"c": ("c={a: 1,  b: 2}",)}, seeds=(0, 1))


def losses(*controls: Control) -> dict[tuple[str, ...], float]:
    """The effect is there, and the absent one is not."""
    found: dict[tuple[str, ...], float] = {}
    for control in controls:
        baseline, arm = control.sweeps({})[0].arms
        found |= {run.overrides: 2.0 for run in baseline.runs}
        found |= {run.overrides: (2.3 if control.is_effect else 2.0) + 0.01 * (-1) ** run.seed for run in arm.runs}
    return found


@pytest.fixture
def done(tmp_path: Path) -> record.Record:
    written = record.updated(losses(EFFECT, ABSENT), [EFFECT, ABSENT])
    written.write(tmp_path)
    return written


def test_it_is_read_as_it_was_written(tmp_path: Path, done: record.Record) -> None:
    assert record.read(tmp_path) == done
    assert done.losses() == losses(EFFECT, ABSENT) and not done.missing


def test_a_diverged_run_is_read_as_one(tmp_path: Path) -> None:
    known = {**losses(EFFECT), EFFECT.missing({})[0]: math.inf}
    written = record.updated(known, [EFFECT])
    written.write(tmp_path)
    read = record.read(tmp_path)
    assert read is not None and read.losses() == known and read.outcomes["effect"].wrong == 1


def test_the_line_counts_what_was_found(tmp_path: Path, done: record.Record) -> None:
    assert record.line(tmp_path) == done.summary.sentence
    inner = tmp_path / "ablation" / "name" / "now"
    inner.mkdir(parents=True)
    assert record.line_above(inner) == record.line(tmp_path)


def test_a_report_names_the_calibration_above_its_sweep_or_that_there_is_none(tmp_path: Path) -> None:
    findings = find(read_sweep(ablation(tmp_path / "ablation")))
    assert basis(findings).endswith(NOT_CALIBRATED)
    record.updated(losses(EFFECT, ABSENT), [EFFECT, ABSENT]).write(tmp_path)
    assert basis(findings).endswith(str(record.line(tmp_path)))
    assert str(record.line(tmp_path)) in build.write(findings).read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"instrument": replace(record.instrument(), machine="another")},
        {"missing": ("effect",)},
    ],
)
def test_another_machine_and_half_a_calibration_count_as_none(
    tmp_path: Path, done: record.Record, changes: dict[str, Any]
) -> None:
    replace(done, **changes).write(tmp_path)
    assert record.line(tmp_path) is None


def test_no_record_and_a_damaged_one_count_as_none(tmp_path: Path, done: record.Record) -> None:
    assert record.line(tmp_path / "nowhere") is None
    file = tmp_path / record.FILE
    text = file.read_text()
    for damaged in (
        text[: len(text) // 2],
        "[]",
        json.dumps({**json.loads(text), "runs": {"a": "b"}}),
        json.dumps({**json.loads(text), "runs": {"1": 2.0}}),
    ):
        file.write_text(damaged)
        assert record.read(tmp_path) is None and record.line(tmp_path) is None


@pytest.mark.parametrize("changes", [{"code": "0" * 64}, {"versions": {"torch": "1.0"}}])
def test_other_code_or_versions_are_named(tmp_path: Path, done: record.Record, changes: dict[str, Any]) -> None:
    replace(done, instrument=replace(record.instrument(), **changes)).write(tmp_path)
    line = record.line(tmp_path)
    assert line is not None and done.date in line and line != replace(done).summary.sentence


def test_the_code_is_that_of_blocks_and_configurations_but_not_of_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, elsewhere = tmp_path / "package", tmp_path / "elsewhere"
    for folder in (package, elsewhere, elsewhere / "tests"):
        folder.mkdir()
    (package / "linked").symlink_to(elsewhere)
    monkeypatch.setattr(record.blockwright, "__file__", str(package / "__init__.py"))
    seen = {record._code()}
    for file in ("package/a.py", "elsewhere/b.yaml"):
        (tmp_path / file).write_text("1")
        seen.add(record._code())
    assert len(seen) == 3
    (elsewhere / "tests" / "test_b.py").write_text("1")
    assert record._code() in seen
    (elsewhere / "b.yaml").write_text("2")
    assert record._code() not in seen
