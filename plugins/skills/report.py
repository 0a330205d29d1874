"""The section of a report on skills: a radar of the arms, and a table of accuracies and bytes of state."""

from __future__ import annotations

import math
from collections.abc import Mapping

from blockwright.lab.report import words
from blockwright.lab.report.charts import Drawing
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.svg import Figure, colour
from blockwright.lab.report.sweep import Run
from blockwright.lab.report.tables import Table, row
from blockwright.lab.statistics.intervals import Interval, interval
from blockwright.plugins.skills.chart import Spokes, radar
from blockwright.plugins.skills.measure import FILE, Level, Measured
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json

Skilled = Mapping[str, list[Measured]]  # skill → what each seed's run has found
MOST = 20  # skills of a run


def charts(findings: Findings) -> list[Figure]:
    """One radar, of the arms that have measured three skills or more."""
    known = {arm.name: _skills(arm) for arm in findings.arms}
    at = {skill: found[0].at_trained for each in known.values() for skill, found in each.items()}
    centre = {skill: max(level.chance, level.floor) for skill, level in at.items()}
    if len(centre) < 3:
        return []
    arms = [
        Spokes(arm.name, colour(arm, findings), {skill: _accuracy(found) for skill, found in known[arm.name].items()})
        for arm in findings.arms
    ]
    drawn = radar("skills", "Skills of the arms", centre, [arm for arm in arms if arm.found])
    caption = (
        "Right answers at the hardest difficulty of training, mean over seeds: the centre is what needs no skill, the "
        "higher of chance and a guess among what the row tells; the rim is all right, as the oracle of each skill is. "
        "Bars: 95 % intervals."
    )
    return [Figure(drawn, "Skills", caption)]


def tables(findings: Findings) -> list[Table]:
    """One table: a row per arm, a column per skill, and the bytes of state at its hardest difficulty."""
    known = {arm.name: _skills(arm) for arm in findings.arms}
    first = {skill: found[0] for each in known.values() for skill, found in each.items()}
    if not first:
        return []
    heads = [f"{skill} ({each.at_trained.difficulty:,} {each.unit})" for skill, each in first.items()]
    columns = ("arm", *heads, "state bytes")
    rows = [row(arm.name, *_cells(known[arm.name], list(first))) for arm in findings.arms]
    for name in ("chance", "floor"):
        rows.append(row(name, *(words.plain(getattr(each.at_trained, name), 3) for each in first.values()), "–"))
    longest = max(each.at_trained.length for each in first.values())
    note = (
        "Share of right answers ± the 95 % interval over seeds. State: bytes of all caches in fp32, by skill at the "
        f"length of its rows, the longest here ({longest:,} tokens). Chance: the likeliest answer to the last symbol "
        f"alone, as measured. Floor: a guess among the answers that the row tells.{_capacity(known)}"
    )
    return [Table("Accuracy and state", columns, tuple(rows), frozenset(columns[1:]), note=note)]


def _cells(found: Skilled, skills: list[str]) -> list[str]:
    accuracies = [words.around(_accuracy(found[skill])) if skill in found else "–" for skill in skills]
    states = [state for each in found.values() if (state := each[0].at_trained.state_bytes) is not None]
    return [*accuracies, f"{max(states):,}" if states else "–"]


def _capacity(known: Mapping[str, Skilled]) -> str:
    """A sentence on the bits that weights hold, where a skill asks for knowledge."""
    held = []
    for arm, skills in known.items():
        for found in skills.values():
            bits = [each.at_trained.learned_bits() for each in found]
            if all(each is not None for each in bits) and found[0].parameters:
                mean = math.fsum(each for each in bits if each is not None) / len(bits)
                held.append(f"{arm} {mean / found[0].parameters:.3f}")
    return f" Bits of knowledge a parameter: {', '.join(held)}." if held else ""


def _accuracy(found: list[Measured]) -> Interval:
    return interval([each.at_trained.accuracy for each in found])


def _skills(finding: Finding) -> Skilled:
    """What the compared runs of an arm have found; only skills that all of them measured alike."""
    runs = [found for run in finding.runs if run.seed in finding.values and (found := _found(run))]
    alike: dict[str, list[Measured]] = {}
    for skill in runs[0] if runs else ():
        each = [found[skill] for found in runs if skill in found]
        levels: set[Level] = {one.at_trained for one in each}
        if len(each) == len(runs) and len({(level.difficulty, level.length) for level in levels}) == 1:
            alike[skill] = each
    return alike


def _found(run: Run) -> dict[str, Measured]:
    """Skill → what a run has found; empty if it has measured none, or its file is damaged."""
    try:
        assert run.folder is not None
        listed = read_json(run.folder, FILE)["skills"][:MOST]
        return {found.skill: found for found in map(Measured.of, listed)}
    except (AssertionError, ConfigError, OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}


SKILLS = Drawing("Skills", charts, tables)
