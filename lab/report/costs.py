"""Final figure against cost: parameters, FLOPs and cache bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from blockwright.lab.report.figure import LETTER, Figure, colour
from blockwright.lab.report.findings import Finding, Findings, pareto
from blockwright.lab.report.svg import LINE, Chart, Scale, cut, padded
from blockwright.lab.report.words import around, short

COSTS = {
    "params": ("Parameters", "parameters"),
    "flops": ("Computation", "training FLOPs a token"),
    "cache_bytes": ("Memory", "cache bytes a token, fp32"),
}
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
    steps = [(x(costs[i]), y(middles[i])) for i in front]
    chart.path([p for a, b in pairwise(steps) for p in (a, (b[0], a[1]), b)], "front")
    _points(chart, known, front, findings, lambda f: x(f.figures[cost]), y)
    caption = (
        "Filled: by their means no other arm costs as little and is as good (Pareto front, dotted). "
        "Bars: the 95 % interval of the mean over seeds."
    )
    return Figure(chart, f"{heading}: {metric} against {label}", caption)


def is_alike(costs: Sequence[float]) -> bool:
    """Whether all arms cost the same."""
    return bool(costs) and max(costs) <= min(costs) * ALIKE


def _points(
    chart: Chart,
    known: Sequence[Finding],
    front: Sequence[int],
    findings: Findings,
    x: Callable[[Finding], float],
    y: Scale,
) -> None:
    area = chart.clipped()
    for finding in known:
        assert finding.interval is not None
        low, high, at = finding.interval.low, finding.interval.high, colour(finding, findings)
        if low is not None and high is not None:
            chart.add("line", f"bar {at}", into=area, x1=x(finding), x2=x(finding), y1=y(low), y2=y(high))
    taken: list[tuple[float, float, float]] = []
    for i, finding in enumerate(known):
        assert finding.interval is not None
        at, here = colour(finding, findings), (x(finding), y(finding.interval.mean))
        tip = f"{finding.name}: {around(finding.interval)}"
        chart.add("circle", f"{'dot' if i in front else 'ring'} {at}", tip=tip, cx=here[0], cy=here[1], r=5)
        _point_label(chart, finding.name, at, here, taken)


def _point_label(
    chart: Chart, name: str, at: str, here: tuple[float, float], taken: list[tuple[float, float, float]]
) -> None:
    """A label beside its point, on the side with room, moved vertically to avoid other labels."""
    word = cut(name, 18)
    left = here[0] > (chart.x0 + chart.x1) / 2 and here[0] + 9 + LETTER * len(word) > chart.x1 + 20
    start = here[0] - 9 - LETTER * len(word) if left else here[0] + 9
    end, moved = start + LETTER * len(word), sorted((step * LINE for step in range(-8, 9)), key=abs)
    free = [m for m in moved if not any(a < end and start < b and abs(here[1] + m - c) < LINE for a, b, c in taken)]
    place = here[1] + (free[0] if free else 0.0)
    taken.append((start, end, place))
    if abs(place - here[1]) > LINE:
        edge = here[0] + (-8 if left else 8)
        chart.add("line", f"leader {at}", x1=here[0], x2=edge, y1=here[1], y2=place)
    cls = ("end " if left else "") + ("strong" if at == "s0" else "")
    chart.add("text", cls.strip(), word, tip=name, x=here[0] + (-9 if left else 9), y=place + 4)
