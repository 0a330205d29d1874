"""The charts of a report, by section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise

from blockwright.lab.report.findings import Finding, Findings, pareto
from blockwright.lab.report.learning import bands, curves, experts, gaps, paths, search, tuning
from blockwright.lab.report.svg import LETTER, LINE, Chart, Figure, Point, Scale, colour, cut, padded
from blockwright.lab.report.tables import Table
from blockwright.lab.report.words import around, short, signed

# --- final figure against cost: parameters, FLOPs and cache bytes -----------------------------------------------------


COSTS = {
    "params": ("Parameters", "parameters"),
    "flops": ("Computation", "training FLOPs per token"),
    "cache_bytes": ("Memory", "cache bytes per token, fp32"),
}
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
ALIKE = 1.001  # costs within this ratio count as equal


def trade(findings: Findings, cost: str) -> Figure | None:
    """Final figure against a cost, with the Pareto front."""
    known = [f for f in findings.arms if f.interval is not None and cost in f.figures]
    if len(known) < 2 or is_alike([f.figures[cost] for f in known]):
        return None
    heading, label = COSTS[cost]
    metric = findings.sweep.metric
    chart = Chart(f"trade-{cost.replace('_', '-')}", f"{metric} against {label}", 280, right=24, top=30)
    costs = [f.figures[cost] for f in known]
    middles = [f.interval.mean for f in known if f.interval]
    log = 0 < 6 * min(costs) < max(costs)  # a cache that does not grow has no logarithm
    if log:
        beside = (max(costs) / min(costs)) ** 0.12
        x = Scale(min(costs) / beside, max(costs) * beside, chart.x0, chart.x1, log=True)
    else:
        x = Scale(*padded(costs, 0.15, least=0.1), chart.x0, chart.x1)
    room = 2 * (max(middles) - min(middles))  # longer bars are cut, so that the others stay visible
    ends = [e for f in known if f.interval for e in (f.interval.low, f.interval.high) if e is not None]
    near = [min(max(e, min(middles) - room), max(middles) + room) for e in ends]
    y = Scale(*padded([*middles, *near]), chart.y0, chart.y1)
    chart.axes(x, y, label, metric, short)
    front = pareto(list(zip(costs, middles, strict=True)), findings.sweep.maximize)
    steps = [(costs[i], middles[i]) for i in front]
    chart.curve([p for a, b in pairwise(steps) for p in (a, (b[0], a[1]), b)], "front")
    _points(chart, known, list(zip(costs, middles, strict=True)), front, findings)
    caption = (
        "Filled: by their means no other arm costs as little and is as good (Pareto front, dotted). "
        "Bars: the 95 % interval of the mean over seeds; with an arrow, it continues beyond the axis."
    )
    return Figure(chart, f"{heading}: {metric} against {label}", caption)


def is_alike(costs: Sequence[float]) -> bool:
    """Whether all arms cost the same."""
    return bool(costs) and max(costs) <= min(costs) * ALIKE


def _points(
    chart: Chart, known: Sequence[Finding], points: Sequence[Point], front: Sequence[int], findings: Findings
) -> None:
    taken: list[Box] = []
    for finding, (cost, _) in zip(known, points, strict=True):
        assert finding.interval is not None
        low, high = finding.interval.low, finding.interval.high
        if low is not None and high is not None:
            (px, below), (_, above) = chart.at((cost, low)), chart.at((cost, high))
            chart.bar(colour(finding, findings), (px, below), (px, above))
            taken.append((px - 3, above, px + 3, below))
    for i, (finding, point) in enumerate(zip(known, points, strict=True)):
        tip = f"{finding.name}: {around(finding.interval)}"
        chart.mark(f"{'dot' if i in front else 'ring'} {colour(finding, findings)}", point, 5.0, tip)
        px, py = chart.at(point)
        taken.append((px - 6, py - 6, px + 6, py + 6))
    for finding, point in zip(known, points, strict=True):
        _point_label(chart, finding.name, colour(finding, findings), chart.at(point), taken)


def _point_label(chart: Chart, name: str, at: str, point: Point, taken: list[Box]) -> None:
    """A label beside its point, to the right if there is room, moved vertically to avoid bars, points and labels."""
    word, (px, py) = cut(name, 18), point
    width = LETTER * len(word)
    moves = sorted((step * LINE / 2 for step in range(-16, 17)), key=abs)
    boxes = [(left, _box(px - 9 - width if left else px + 9, py + move, width)) for move in moves for left in (0, 1)]
    inside = [each for each in boxes if _fits(each[1], chart)] or boxes
    left, box = next((each for each in inside if not any(_overlap(each[1], other) for other in taken)), inside[0])
    taken.append(box)
    place = (box[1] + box[3]) / 2
    if abs(place - py) > LINE:
        chart.add("line", f"leader {at}", x1=px, x2=px + (-8 if left else 8), y1=py, y2=place)
    cls = " ".join(filter(None, ("halo", "end" if left else "", "strong" if at == "s0" else "")))
    chart.add("text", cls, word, tip=name, x=px + (-9 if left else 9), y=place + 4)


def _box(left: float, middle: float, width: float) -> Box:
    return left, middle - LINE / 2, left + width, middle + LINE / 2


def _fits(box: Box, chart: Chart) -> bool:
    return chart.x0 <= box[0] and box[2] <= chart.x1 - LETTER and chart.y1 - LINE <= box[1] and box[3] <= chart.y0


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# --- each arm against the baseline, seed by seed ----------------------------------------------------------------------


def differences(findings: Findings) -> Figure | None:
    """Each arm's paired differences to the baseline: a ring per seed, a dot for the mean, a bar for its interval."""
    shown = [f for f in findings.others if f.comparison is not None]
    if not shown:
        return None
    metric, row = findings.sweep.metric, 30
    others = list(dict.fromkeys(f.against for f in shown))
    other, named = others[0] if len(others) == 1 else "its own", " or ".join(others)
    left = 16 + LETTER * max(len(cut(f.name, 18)) for f in shown)
    chart = Chart("differences", f"{metric}: differences to {named}", row * len(shown) + 66, left=left, top=22)
    values = [0.0, *(v for f in shown if f.comparison for v in _reach(f))]
    x = Scale(*padded(values), chart.x0, chart.x1)
    better = "right" if findings.sweep.maximize else "left"
    of = f", {findings.sweep.unit}" if findings.sweep.unit else ""
    chart.axes(x, None, f"difference in {metric}{of} ({better} is better)")
    chart.add("line", "zero", x1=x(0), x2=x(0), y1=chart.y1 - 4, y2=chart.y0)
    chart.add("text", "name mid", cut(other, 16), x=min(max(x(0), chart.x0 + 30), chart.x1 - 30), y=13)
    for i, finding in enumerate(shown):
        _difference_row(chart, finding, findings, x, chart.y1 + row * (i + 0.5))
    level = "interval at the level of its look" if findings.sweep.design.looks else "95 % interval"
    caption = (
        f"Rings: each seed, against the same seed of {named}. Dot and bar: their mean and its {level}. "
        "A bar that crosses the line tells nothing from noise; one with an arrow continues beyond the axis."
    )
    return Figure(chart, "Paired differences", caption)


def _reach(finding: Finding) -> list[float]:
    """Range of the axis; an interval far beyond its own seeds is cut, so that the rest stays visible."""
    assert finding.comparison is not None
    values, found = list(finding.comparison.by_seed.values()), finding.comparison.difference
    if found.low is None or found.high is None:
        return values
    widest = 2.5 * max(max(map(abs, values)), 1e-12)
    return [*values, max(found.low, -widest), min(found.high, widest)]


def _difference_row(chart: Chart, finding: Finding, findings: Findings, x: Scale, at: float) -> None:
    assert finding.comparison is not None
    cls, found = colour(finding, findings), finding.comparison.difference
    chart.add("line", "grid", x1=chart.x0, x2=chart.x1, y1=at, y2=at)
    chart.add("text", "end", cut(finding.name, 18), tip=finding.name, x=chart.x0 - 9, y=at + 4)
    if found.low is not None and found.high is not None:
        chart.bar(cls, (x(found.low), at), (x(found.high), at), around(found, sign=True))
    for seed, value in finding.comparison.by_seed.items():
        tip = f"seed {seed}: {signed(value, 4)}"
        chart.add("circle", f"ring {cls}", cx=x(value), cy=at - 8 if found.n > 1 else at, r=3.2, tip=tip)
    if found.n > 1:
        chart.add("circle", f"dot {cls}", cx=x(found.mean), cy=at, r=5, tip=around(found, sign=True))


ENTRY_POINTS = "blockwright.charts"


def draw(findings: Findings) -> dict[str, list[Figure]]:
    """Section → its charts, without those that have no data."""
    if findings.sweep.kind == "search":
        return {"search": _some([search(findings)])}
    return {
        "differences": _some([differences(findings)]),
        "curves": _some([curves(findings, "tokens"), curves(findings, "flops"), gaps(findings)]),
        "trade": _some([trade(findings, cost) for cost in COSTS]),
        "tuning": _some([chart(findings, path) for path in paths(findings) for chart in (tuning, bands)]),
        "experts": _some([experts(i, finding) for i, finding in enumerate(findings.arms)]),
    }


def no_tables(findings: Findings) -> list[Table]:
    """Of a section of charts alone."""
    return []


@dataclass(frozen=True)
class Drawing:
    """A section of a report that a package offers in the entry points ``blockwright.charts``.

    Args:
        title: of the section
        draw: its charts; ``of_each`` makes it of a function of one arm
        tabulate: its tables
    """

    title: str
    draw: Callable[[Findings], list[Figure]]
    tabulate: Callable[[Findings], list[Table]] = no_tables


def of_each(draw: Callable[[int, Finding], list[Figure]]) -> Callable[[Findings], list[Figure]]:
    """The charts of all arms.

    Args:
        draw: the number of an arm and the arm → its charts
    """
    return lambda findings: [figure for number, arm in enumerate(findings.arms) for figure in draw(number, arm)]


def offered() -> dict[str, Drawing]:
    """Name of a section → its drawing, in alphabetical order."""
    return {point.name: point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name)}


def _some(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
