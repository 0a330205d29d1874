"""Final figure against cost: parameters, FLOPs and cache bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from blockwright.lab.report.figure import LETTER, Figure, colour
from blockwright.lab.report.findings import Finding, Findings, pareto
from blockwright.lab.report.scale import Scale, padded
from blockwright.lab.report.svg import LINE, Chart, Point, cut
from blockwright.lab.report.words import around, short

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
