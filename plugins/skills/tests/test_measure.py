"""Measuring skills: an oracle has everything right, a guess has chance; the section of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import IDS, OracleDecoder, Silent
from sweep_folder import ablation

from blockwright import registry
from blockwright.blocks.compose import compose, preset
from blockwright.lab.report import build, charts, reading
from blockwright.lab.report.findings import find
from blockwright.lab.report.svg import standalone
from blockwright.plugins.skills.measure import FILE, Level, Measured, measure
from blockwright.plugins.skills.report import SKILLS, by_difficulty, tables
from blockwright.plugins.skills.skill.base import Skill
from blockwright.registry import Node, Scope


def skills(*nodes: Any) -> list[Skill]:
    return [registry.build("skill", Node(node, "skill"), Scope({}, {})) for node in nodes]


@pytest.fixture(autouse=True)
def no_state(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The decoders of answering.py have no caches."""
    if "state" not in request.node.name:
        monkeypatch.setattr("blockwright.plugins.skills.measure._state_bytes", lambda decoder, length: None)


@pytest.mark.parametrize("name", ["recall", "stacked"])
def test_the_oracle_scores_everything_through_the_tokens(name: str) -> None:
    known = skills("recall" if name != "recall" else "depth", name)
    found = measure(OracleDecoder(known), known[1], 1, IDS, 2)  # type: ignore[arg-type]
    assert [level.accuracy for level in found.levels] == [1.0] * len(known[1].levels)
    assert all(level.solved == level.rows == 2 and level.nats < 1e-6 for level in found.levels)
    assert found.at_trained.difficulty == known[1].difficulty


def test_a_decoder_without_an_answer_has_none_right() -> None:
    (recall,) = skills("recall")
    level = measure(Silent([recall]), recall, 0, IDS, 5, [2]).levels[0]  # type: ignore[arg-type]
    assert (level.right, level.solved, level.rows, level.answers, level.length) == (0, 0, 5, 10, 8)
    low, high = level.interval
    assert low < 1e-9 and 0.4 < high < 0.5  # of five rows, not of ten answers


def test_a_mark_of_another_skill_is_another_question() -> None:
    """The measured rows have the mark of the place: an oracle that reads it answers by the wrong skill."""
    known = skills("recall", "knowledge")
    with_wrong = measure(OracleDecoder(known), known[0], 1, IDS, 3, [4])  # type: ignore[arg-type]
    assert with_wrong.levels[0].accuracy < 0.5


def test_an_untrained_model_is_near_chance_and_its_state_has_its_bytes(tiny: Callable[..., dict[str, Any]]) -> None:
    (recall,) = skills("recall")
    decoder = compose(preset("tiny_skills"), seed=0).eval()
    found = measure(decoder, recall, 0, IDS, 40, [4, 16])
    assert all(level.accuracy < 0.15 and level.nats > 3 for level in found.levels)
    for level in found.levels:  # keys and values of two layers, three last inputs of the convolution
        assert level.state_bytes == 4 * (2 * 2 * 64 * level.length + 3 * 64)
    none = {"attention": "none", "layout": None, "variants": None}
    assert measure(compose(preset("tiny_skills", none)).eval(), recall, 0, IDS, 1, [4]).levels[0].state_bytes == 0


def test_bits_held_are_what_the_loss_is_below_a_blind_guess() -> None:
    usual = {
        "length": 48,
        "rows": 9,
        "answers": 144,
        "right": 9,
        "solved": 0,
        "chance": 0.1,
        "floor": 0.2,
        "bits": 600.0,
    }
    blind, half, all_known = (Level(100, **usual, nats=6 * share * math.log(2)) for share in (1, 0.5, 0))  # type: ignore[arg-type]
    assert [round(level.learned_bits() or 0, 6) for level in (blind, half, all_known)] == [0, 300, 600]
    assert Level(100, **{**usual, "bits": None}, nats=9.0).learned_bits() is None  # type: ignore[arg-type]


def test_what_is_written_is_read_again_and_damage_is_refused() -> None:
    (recall,) = skills("recall")
    found = measure(Silent([recall]), recall, 0, IDS, 2, [4, 16])  # type: ignore[arg-type]
    plain = found.to_plain()
    assert Measured.of(plain) == found
    for damage in ({"levels": []}, {"levels": [{}]}, {"trained": "hard"}, {"unit": 3, "levels": None}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            Measured.of({**plain, **damage})
    too_right = {**plain["levels"][0], "right": 10**6}
    with pytest.raises(ValueError):
        Measured.of({**plain, "levels": [too_right]})


def test_a_curve_names_its_points() -> None:
    known = skills("recall", "depth")
    found = [measure(Silent(known), skill, place, IDS, 2, [2, skill.difficulty]) for place, skill in enumerate(known)]  # type: ignore[arg-type]
    svg = standalone(by_difficulty(found))
    assert "recall, 16 pairs: 0.000 (0.000 to" in svg and "depth, 4 hops" in svg and svg.count("<circle") == 2 + 2


@pytest.mark.slow
def test_attention_learns_to_recall_and_without_attention_chance_is_left() -> None:
    """16 pairs: all by attention after 400 steps, chance without it, where a quarter of the steps says as much."""
    import numpy as np

    from blockwright.plugins.skills.rows import Mixed, SkillRows

    (recall,) = skills("recall")
    rows = SkillRows(Mixed([recall], IDS, 64, 0), "train")
    shares = {}
    none = {"attention": "none", "layout": None, "variants": None}
    for name, steps, changes in (("attention", 400, {}), ("none", 100, none)):
        decoder = compose(preset("tiny_skills", {"n_layers": 2, **changes}), seed=0).train()
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * min(1.0, (step + 1) / 8, (steps - step) / 200)
            batch = rows.__getitems__(np.arange(32 * step, 32 * step + 32).tolist())
            loss = decoder.nll(decoder.hidden(batch["tokens"])[0], batch["targets"])
            (loss / (batch["targets"] != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        shares[name] = measure(decoder.eval(), recall, 0, IDS, 100).at_trained
    assert shares["attention"].accuracy > 0.95
    assert abs(shares["none"].accuracy - shares["none"].chance) < 0.02


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


def test_the_report_has_both_in_one_section_and_of_fewer_than_three_skills_a_table_alone(sweep: Path) -> None:
    assert charts.offered()["skills"] is SKILLS
    sections = {section.id: section for section in build.arrange(find(reading.read(sweep)))}
    assert len(sections["skills"].figures) == len(sections["skills"].tables) == 1
    for file in sweep.glob(f"*/{FILE}"):
        file.write_text(json.dumps({"skills": json.loads(file.read_text())["skills"][:2]}))
    findings = find(reading.read(sweep))
    assert not SKILLS.draw(findings) and len(tables(findings)) == 1


DAMAGED = [
    "",
    "[]",
    "{",
    '{"skills": 3}',
    '{"skills": [{"skill": "recall"}]}',
    '{"skills": [null]}',
    '{"skills": {"a": 1}}',
]


def test_a_damaged_file_takes_its_run_out_of_the_section(sweep: Path) -> None:
    for text in DAMAGED:
        (sweep / "0" / FILE).write_text(text)
        rows = cells(sweep)
        assert rows["mha"] == ["0.905 ± 0.064"] * 3 + ["4,096"] and rows["mla"][0] == "0.600 ± 0.025", text


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
