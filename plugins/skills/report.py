"""What is drawn of skills: a radar of arms and a curve over difficulty, and the section of a report with its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockwright.lab.report import words
from blockwright.lab.report.charts import Drawing
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.svg import LINE, Chart, Figure, Point, Scale, colour, colour_of, cut, end_labels, room_of
from blockwright.lab.report.sweep import Run
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import around
from blockwright.lab.statistics.intervals import Interval, interval
from blockwright.plugins.skills.measure import FILE, Level, Measured
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json

RADIUS = 118.0  # pixels from what needs no skill to 1
MIDDLE = (190.0, 166.0)
RINGS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Spokes:
    """One arm on a radar.

    Args:
        name: of the arm
        colour: class of its colour
        found: skill → its accuracy over seeds
    """

    name: str
    colour: str
    found: Mapping[str, Interval]


def radar(name: str, title: str, skills: Mapping[str, float], arms: Sequence[Spokes]) -> Chart:
    """A spoke per skill, from what needs no skill at the centre to all answers right at the rim; a closed line per arm.

    An arm's marks carry its interval as tooltips and bars along the spoke, so that it is read without its colour too.

    Args:
        name, title: of the chart
        skills: name → accuracy without the skill, in the order of the spokes; at least three
        arms: in the order of their legend
    """
    chart = Chart(name, title, 336 + LINE * (len(arms) // 3), top=8, bottom=8)
    angles = {skill: 2 * math.pi * i / len(skills) for i, skill in enumerate(skills)}
    for ring in RINGS:
        chart.path(_closed([_at(angle, ring) for angle in angles.values()]), "front")
    for skill, angle in angles.items():
        _spoke(chart, skill, angle)
    for arm in arms:
        known = {skill: _above(arm.found[skill].mean, chance) for skill, chance in skills.items() if skill in arm.found}
        chart.path(_closed([_at(angles[skill], share) for skill, share in known.items()]), f"curve {arm.colour}")
        for skill, share in known.items():
            _bar(chart, arm, skill, angles[skill], skills[skill])
            x, y = _at(angles[skill], share)
            tip = f"{arm.name}, {skill}: {around(arm.found[skill])}"
            chart.add("circle", f"dot {arm.colour}", cx=x, cy=y, r=4.0, tip=tip)
    for i, arm in enumerate(arms):
        x, y = 8.0 + 145 * (i % 3), 312.0 + LINE * (i // 3)
        chart.add("line", f"curve {arm.colour}", x1=x, x2=x + 16, y1=y, y2=y)
        chart.add("text", "tick", cut(arm.name, 18), tip=arm.name, x=x + 21, y=y + 4)
    return chart


def _above(accuracy: float, chance: float) -> float:
    """0 for chance or worse, 1 where all is right."""
    return max(0.0, (accuracy - chance) / (1 - chance)) if chance < 1 else 0.0


def _at(angle: float, share: float) -> Point:
    return MIDDLE[0] + RADIUS * share * math.sin(angle), MIDDLE[1] - RADIUS * share * math.cos(angle)


def _closed(points: Sequence[Point]) -> list[Point]:
    return [*points, points[0]] if points else []


def _spoke(chart: Chart, skill: str, angle: float) -> None:
    (x, y), (tx, ty) = _at(angle, 1.0), _at(angle, 1.1)
    chart.add("line", "grid", x1=MIDDLE[0], y1=MIDDLE[1], x2=x, y2=y)
    side = math.sin(angle)
    cls = "tick mid" if abs(side) < 0.2 else "tick" if side > 0 else "tick end"
    chart.add("text", cls, skill.replace("_", " "), x=tx, y=ty + 4)


def _bar(chart: Chart, arm: Spokes, skill: str, angle: float, chance: float) -> None:
    """The interval along a spoke."""
    found = arm.found[skill]
    if found.low is not None and found.high is not None:
        (x1, y1), (x2, y2) = (_at(angle, min(1.0, _above(end, chance))) for end in (found.low, found.high))
        chart.add("line", f"bar seed {arm.colour}", x1=x1, y1=y1, x2=x2, y2=y2)


def by_difficulty(found: Sequence[Measured], name: str = "skills") -> Chart:
    """A line per skill: right answers over difficulty, with Wilson's interval of each."""
    room = room_of([each.skill for each in found])
    chart = Chart(name, "Right answers by difficulty", 260, right=room, top=30)
    hardest = [level.difficulty for each in found for level in each.levels]
    x = Scale(0.9 * min(hardest), 1.1 * max(hardest), chart.x0, chart.x1, log=True)
    chart.axes(x, Scale(0.0, 1.0, chart.y0, chart.y1), "difficulty", "right answers", lambda value: f"{value:,.0f}")
    ends = []
    for place, each in enumerate(found):
        at = colour_of(place)
        points = [(float(level.difficulty), level.accuracy) for level in each.levels]
        chart.curve(points, f"curve {at}")
        for point, level in zip(points, each.levels, strict=True):
            low, high = level.interval
            chart.bar(at, chart.at((point[0], low)), chart.at((point[0], high)))
            tip = f"{each.skill}, {level.difficulty:,} {each.unit}: {level.accuracy:.3f} ({low:.3f} to {high:.3f})"
            chart.mark(f"dot {at}", point, 4.0, tip)
        ends.append((each.skill, at, points[-1]))
    end_labels(chart, ends)
    return chart


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
