"""The section of a report: which arms and skills it shows, and what it makes of damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import ablation

from blockwright.lab.report import build, charts, reading
from blockwright.lab.report.findings import find
from blockwright.lab.report.svg import standalone
from blockwright.plugins.skills.measure import FILE, Level, Measured
from blockwright.plugins.skills.report import SKILLS, tables

SKILLS_OF_RUNS = ("recall", "depth", "knowledge")
RIGHT = {"mha": 90, "gqa": 80, "mla": 60, "moe": 10}
SEEDS = 3


def found(skill: str, right: int, state: int | None = 4096) -> Measured:
    bits = 16 * 6.0 if skill == "knowledge" else None
    easy = Level(8, 32, 10, 100, 100, 10, 0.0, 0.1, 0.2, 64, bits)
    hard = replace(easy, difficulty=16, length=64, right=right, solved=2, nats=2.0, state_bytes=state)
    return Measured(skill, "pairs", 16, (easy, hard), 1000)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """An ablation of four arms whose runs have measured three skills, the seeds a little apart."""
    folder = ablation(tmp_path, SEEDS)
    for job in json.loads((folder / "plan.json").read_text())["jobs"]:
        if job["arm"] in RIGHT:
            measured = [found(skill, RIGHT[job["arm"]] + job["seed"] - 1).to_plain() for skill in SKILLS_OF_RUNS]
            (folder / str(job["job"]) / FILE).write_text(json.dumps({"skills": measured}))
    return folder


def cells(sweep: Path) -> dict[str, list[str]]:
    (table,) = tables(find(reading.read(sweep)))
    return {row.cells[0][0].text: [cell[0].text for cell in row.cells[1:]] for row in table.rows}


def test_the_table_has_every_arm_its_intervals_its_state_and_chance(sweep: Path) -> None:
    (table,) = tables(find(reading.read(sweep)))
    assert table.columns == ("arm", *(f"{skill} (16 pairs)" for skill in SKILLS_OF_RUNS), "state bytes")
    rows = cells(sweep)
    assert rows["mha"] == ["0.900 ± 0.025"] * 3 + ["4,096"]
    assert rows["chance"] == ["0.100"] * 3 + ["–"] and rows["floor"] == ["0.200"] * 3 + ["–"]
    assert rows["broken <b>&"] == ["–"] * 4
    assert "mha 0.050" in table.note  # bits a parameter: 16 · (6 − 2 / ln 2) / 1000


def test_the_radar_has_a_mark_for_each_arm_and_skill(sweep: Path) -> None:
    (figure,) = SKILLS.draw(find(reading.read(sweep)))
    svg = standalone(figure.chart)
    assert svg.count("<circle") == 4 * 3 and "mla, depth: 0.600 ± 0.025" in svg and "broken" not in svg
    assert all(f">{skill}<" in svg for skill in SKILLS_OF_RUNS)


def test_the_report_has_both_in_one_section(sweep: Path) -> None:
    assert charts.offered()["skills"] is SKILLS
    sections = {section.id: section for section in build.arrange(find(reading.read(sweep)))}
    assert len(sections["skills"].figures) == len(sections["skills"].tables) == 1


def test_fewer_than_three_skills_have_a_table_alone(sweep: Path) -> None:
    for file in sweep.glob(f"*/{FILE}"):
        file.write_text(json.dumps({"skills": json.loads(file.read_text())["skills"][:2]}))
    findings = find(reading.read(sweep))
    assert not SKILLS.draw(findings) and len(tables(findings)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"skills": 3}', '{"skills": [{"skill": "recall"}]}', '{"skills": [null]}', '{"skills": {"a": 1}}'],
)
def test_a_damaged_file_takes_its_run_out_of_the_section(sweep: Path, text: str) -> None:
    (sweep / "0" / FILE).write_text(text)
    rows = cells(sweep)
    assert rows["mha"] == ["0.905 ± 0.064"] * 3 + ["4,096"] and rows["mla"][0] == "0.600 ± 0.025"


def test_a_sweep_without_skills_has_no_section(tmp_path: Path) -> None:
    findings = find(reading.read(ablation(tmp_path)))
    assert not SKILLS.draw(findings) and not tables(findings)


def test_unequal_difficulties_are_not_averaged(sweep: Path) -> None:
    file = sweep / "1" / FILE
    plain: Any = json.loads(file.read_text())
    plain["skills"][0]["levels"][1]["difficulty"] = 15
    plain["skills"][0]["trained"] = 15
    file.write_text(json.dumps(plain))
    assert cells(sweep)["mha"] == ["0.900 ± 0.025", "0.900 ± 0.025", "–", "4,096"]
    assert cells(sweep)["mla"][0] == "0.600 ± 0.025"
