"""The charts of a report, each with a sentence that says how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

from lab.report.findings import Finding, Findings, pareto
from lab.report.reading import Run
from lab.report.svg import Chart, Scale, apart, cut, padded
from lab.report.words import around, plain, seeds, short, signed, unit

COLOURS = 7  # that people can tell apart; further arms are grey, and named like the others
COSTS = {
    "params": ("Parameters", "parameters"),
    "flops": ("Computation", "training FLOPs a token"),
    "cache_bytes": ("Memory", "cache bytes a token, fp32"),
}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    chart: Chart
    heading: str
    caption: str

    @property
    def file(self) -> str:
        return f"{self.chart.name}.svg"


def draw(findings: Findings) -> dict[str, list[Figure]]:
    """Section → its charts; those for which nothing was measured are left out."""
    if findings.sweep.kind == "search":
        return {"search": _some([search(findings)])}
    return {
        "differences": _some([differences(findings)]),
        "curves": _some([curves(findings, over) for over in ("tokens", "flops")]),
        "trade": _some([trade(findings, cost) for cost in COSTS]),
        "rates": _some([rates(findings)]),
        "experts": _some([experts(i, finding) for i, finding in enumerate(findings.arms)]),
    }


def _some(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def colour(finding: Finding, findings: Findings) -> str:
    """Class of an arm's colour: the baseline is drawn in ink."""
    if finding.is_baseline:
        return "s0"
    at = [f.name for f in findings.others].index(finding.name)
    return f"s{at + 1 if at < COLOURS else COLOURS + 1}"


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(findings: Findings, over: str) -> Figure | None:
    """Validation loss over tokens or FLOPs: a thin line a seed, a thick one their mean, dashes for a lost run."""
    lines = {f.name: [(run, _line(run, over)) for run in f.runs] for f in findings.arms}
    kept = [(run, line) for found in lines.values() for run, line in found if len(line) > 1]
    whole = [line for run, line in kept if run.value(findings.sweep.metric) is not None]
    if not whole:
        return None
    end = max(line[-1][0] for line in whole)
    late = [loss for line in whole for at, loss in line if at >= 0.2 * end]
    what = "tokens" if over == "tokens" else "training FLOPs"
    chart = Chart(f"loss-over-{over}", f"Validation loss over {what}", 300, right=96, top=30)
    x = Scale(0, end, chart.x0, chart.x1)
    y = Scale(*padded(late), chart.y0, chart.y1)
    chart.axes(x, y, what, "validation loss, nats a token", short)
    area = chart.clipped()
    ends = [_arm_lines(chart, area, f, lines[f.name], findings, x, y) for f in findings.arms]
    _end_labels(chart, [e for e in ends if e], y)
    caption = (
        "Thick: the mean over seeds; thin: each seed; dashed: a run that was lost. "
        f"The loss axis ends at what was reached after a fifth of the {what}."
    )
    return Figure(chart, f"Loss over {what}", caption)


def _line(run: Run, over: str) -> Points:
    each = 1.0 if over == "tokens" else run.curves.get("flops_per_token")
    points = run.loss_over_tokens()
    return [(tokens * each, loss) for tokens, loss in points if math.isfinite(loss)] if each else []


def _arm_lines(
    chart: Chart,
    area: ET.Element,
    finding: Finding,
    lines: list[tuple[Run, Points]],
    findings: Findings,
    x: Scale,
    y: Scale,
) -> tuple[str, str, float, float] | None:
    """Draws an arm's lines; its name, colour and end, for the label."""
    at = colour(finding, findings)
    good = [line for run, line in lines if run.seed in finding.values and len(line) > 1]
    for run, line in lines:
        kind = "seed" if run.seed in finding.values else "lost"
        if kind == "lost" or len(good) > 1:
            tip = f"{finding.name}, seed {run.seed}, job {run.job}"
            chart.path([(x(a), y(b)) for a, b in line], f"curve {kind} {at}", area, tip)
    mean = _mean(good)
    chart.path([(x(a), y(b)) for a, b in mean], f"curve {at}", area, finding.name)
    return (finding.name, at, x(mean[-1][0]), y(mean[-1][1])) if mean else None


def _mean(lines: Sequence[Points]) -> Points:
    """Where all of them were measured."""
    if not lines:
        return []
    maps = [dict(line) for line in lines]
    shared = sorted(set.intersection(*(set(m) for m in maps)))
    return [(at, math.fsum(m[at] for m in maps) / len(maps)) for at in shared]


def _end_labels(chart: Chart, ends: Sequence[tuple[str, str, float, float]], y: Scale) -> None:
    places = apart([min(max(e[3], chart.y1), chart.y0) for e in ends], chart.y1, chart.y0)
    for (name, at, ex, ey), place in zip(ends, places, strict=True):
        chart.add("line", f"leader {at}", x1=ex + 2, x2=chart.x1 + 10, y1=ey, y2=place)
        chart.add("text", "strong" if at == "s0" else "", cut(name, 13), tip=name, x=chart.x1 + 13, y=place + 4)


# --- final figures ----------------------------------------------------------------------------------------------------


def trade(findings: Findings, cost: str) -> Figure | None:
    """Final figure against a cost, with the front of those that nothing beats in both."""
    known = [f for f in findings.arms if f.interval is not None and f.figures.get(cost, 0) > 0]
    if len(known) < 2:
        return None
    heading, label = COSTS[cost]
    metric = findings.sweep.metric
    chart = Chart(f"trade-{cost.replace('_', '-')}", f"{metric} against {label}", 280, right=24, top=30)
    costs = [f.figures[cost] for f in known]
    middles = [f.interval.mean for f in known if f.interval]
    log = max(costs) / min(costs) > 6
    if log:
        room = (max(costs) / min(costs)) ** 0.12
        x = Scale(min(costs) / room, max(costs) * room, chart.x0, chart.x1, log=True)
    else:
        x = Scale(*padded(costs, 0.15, least=0.1), chart.x0, chart.x1)
    ends = [e for f in known if f.interval for e in (f.interval.low, f.interval.high) if e is not None]
    near = [e for e in ends if abs(e - _middle(middles)) < 4 * (max(middles) - min(middles)) + 1e-9]
    y = Scale(*padded([*middles, *near]), chart.y0, chart.y1)
    chart.axes(x, y, label, metric, short)
    front = pareto(list(zip(costs, middles, strict=True)), findings.sweep.maximize)
    steps = [(x(costs[i]), y(middles[i])) for i in front]
    chart.path([p for a, b in pairwise(steps) for p in (a, (b[0], a[1]), b)], "front")
    _points(chart, known, front, findings, lambda f: x(f.figures[cost]), y)
    caption = (
        "Filled: no other arm costs as little and is as good (Pareto front, dotted). Bars: 95 % of the mean over seeds."
    )
    return Figure(chart, f"{heading}: {metric} against {label}", caption)


def _middle(values: Sequence[float]) -> float:
    return (min(values) + max(values)) / 2


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
    places = _beside([(x(f), y(f.interval.mean)) for f in known if f.interval], chart)
    for i, (finding, place) in enumerate(zip(known, places, strict=True)):
        assert finding.interval is not None
        at, here = colour(finding, findings), y(finding.interval.mean)
        tip = f"{finding.name}: {around(finding.interval)}"
        chart.add("circle", f"{'dot' if i in front else 'ring'} {at}", tip=tip, cx=x(finding), cy=here, r=5)
        left = x(finding) > chart.x0 + 0.68 * (chart.x1 - chart.x0)
        cls = ("end " if left else "") + ("strong" if at == "s0" else "")
        chart.add("text", cls.strip(), cut(finding.name, 18), x=x(finding) + (-9 if left else 9), y=place + 4)


def _beside(points: Sequence[tuple[float, float]], chart: Chart) -> list[float]:
    """Heights of labels; those of points one above the other are moved apart."""
    places = [py for _, py in points]
    left = [px > chart.x0 + 0.68 * (chart.x1 - chart.x0) for px, _ in points]
    for side in (False, True):
        mine = [i for i in range(len(points)) if left[i] == side]
        groups: list[list[int]] = []
        for i in sorted(mine, key=lambda i: points[i][0]):
            if groups and points[i][0] - points[groups[-1][-1]][0] < 90:
                groups[-1].append(i)
            else:
                groups.append([i])
        for group in groups:
            for i, place in zip(group, apart([places[i] for i in group], chart.y1, chart.y0), strict=True):
                places[i] = place
    return places


def differences(findings: Findings) -> Figure | None:
    """Each arm's paired differences to the baseline: a ring a seed, a dot for their mean, a bar for its interval."""
    shown = [f for f in findings.others if f.comparison is not None]
    if not shown:
        return None
    metric, row = findings.sweep.metric, 30
    left = min(150, 16 + 7 * max(len(cut(f.name, 18)) for f in shown))
    chart = Chart(
        "differences", f"{metric}: differences to {findings.baseline.name}", row * len(shown) + 66, left=left, top=22
    )
    values = [0.0, *(v for f in shown if f.comparison for v in _reach(f))]
    x = Scale(*padded(values), chart.x0, chart.x1)
    better = "right" if findings.sweep.maximize else "left"
    named = f"{metric} minus that of {cut(findings.baseline.name, 16)}"
    chart.axes(x, None, f"{named}{', ' + unit(metric) if unit(metric) else ''} ({better} is better)")
    chart.add("line", "zero", x1=x(0), x2=x(0), y1=chart.y1 - 4, y2=chart.y0)
    chart.add("text", "name mid", cut(findings.baseline.name, 16), x=min(max(x(0), chart.x0 + 30), chart.x1 - 30), y=13)
    for i, finding in enumerate(shown):
        _difference_row(chart, finding, findings, x, chart.y1 + row * (i + 0.5))
    caption = (
        "Rings: each seed, against the same seed of the baseline. Dot and bar: their mean and its 95 % interval. "
        "A bar that crosses the line tells nothing from noise."
    )
    return Figure(chart, "Paired differences", caption)


def _reach(finding: Finding) -> list[float]:
    """What the axis has to hold; an interval far beyond its own seeds is cut, for it would leave nothing to see."""
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
        ends = [min(max(x(v), chart.x0), chart.x1) for v in (found.low, found.high)]
        chart.add("line", f"bar {cls}", x1=ends[0], x2=ends[1], y1=at, y2=at, tip=around(found, sign=True))
    for seed, value in finding.comparison.by_seed.items():
        tip = f"seed {seed}: {signed(value, 4)}"
        chart.add("circle", f"ring {cls}", cx=x(value), cy=at - 8 if found.n > 1 else at, r=3.2, tip=tip)
    if found.n > 1:
        chart.add("circle", f"dot {cls}", cx=x(found.mean), cy=at, r=5, tip=around(found, sign=True))


def rates(findings: Findings) -> Figure | None:
    """Mean over seeds at each learning rate, where several were tried."""
    tuned = [f for f in findings.arms if len(f.rates) > 1]
    points = {f.name: [(r.lr, r.mean) for r in f.rates if r.lr and r.mean is not None] for f in tuned}
    every = [p for found in points.values() for p in found]
    if len({lr for lr, _ in every}) < 2:
        return None
    chart = Chart("learning-rates", f"{findings.sweep.metric} over the learning rate", 280, right=96, top=30)
    lrs = [lr for lr, _ in every if lr]
    x = Scale(min(lrs) / 1.15, max(lrs) * 1.15, chart.x0, chart.x1, log=True)
    y = Scale(*padded([mean for _, mean in every if mean is not None]), chart.y0, chart.y1)
    chart.axes(x, y, "learning rate", findings.sweep.metric, lambda v: f"{v:g}")
    ends = []
    for f in tuned:
        at, line = colour(f, findings), [(x(lr), y(mean)) for lr, mean in points[f.name] if lr and mean is not None]
        chart.path(line, f"curve {at}", tip=f.name)
        for (px, py), (lr, mean) in zip(line, points[f.name], strict=True):
            kind = "dot" if lr == f.lr else "ring"
            chart.add(
                "circle",
                f"{kind} {at}",
                cx=px,
                cy=py,
                r=5 if kind == "dot" else 3.2,
                tip=f"{f.name}, lr {lr}: {plain(mean)}",
            )
        if line:
            ends.append((f.name, at, *line[-1]))
    _end_labels(chart, ends, y)
    caption = "Filled: the best learning rate of each arm, at which it is compared."
    return Figure(chart, "Learning rates", caption)


def search(findings: Findings) -> Figure | None:
    """Each trial's figure, and the best so far."""
    metric, sign = findings.sweep.metric, -1 if findings.sweep.maximize else 1
    done = [(run.job, v) for run in findings.sweep.runs if (v := run.value(metric)) is not None]
    if len(done) < 2:
        return None
    chart = Chart("search", f"{metric} of each trial, and the best so far", 300, right=24, top=30)
    order = sorted(v * sign for _, v in done)
    worst = order[min(len(order) - 1, math.ceil(0.9 * len(order)))]
    x = Scale(*padded([job for job, _ in done]), chart.x0, chart.x1)
    y = Scale(*padded([sign * order[0], sign * worst]), chart.y0, chart.y1)
    chart.axes(x, y, "trial", metric, lambda v: f"{v:g}")
    area, best, line = chart.clipped(), math.inf, []
    for job, value in done:
        chart.add("circle", "ring s8", into=area, cx=x(job), cy=y(value), r=3.2, tip=f"trial {job}: {plain(value)}")
        line += [(x(job), y(sign * best))] if math.isfinite(best) else []
        best = min(best, sign * value)
        line.append((x(job), y(sign * best)))
    chart.path(line, "curve s1", area, "best so far")
    return Figure(
        chart, "Best so far", "Rings: trials; line: the best until then. The worst tenth may lie beyond the axis."
    )


# --- experts ----------------------------------------------------------------------------------------------------------

ROW = 20  # pixels of a layer


def experts(index: int, finding: Finding) -> Figure | None:
    """Load of each expert over the even load, a row a layer, the mean over seeds."""
    loads = [run.curves.get("expert_load") for run in finding.runs if run.seed in finding.values]
    rows = _mean_loads([load for load in loads if load])
    if not rows:
        return None
    width = max(map(len, rows.values()))
    name = f"experts-{index}"
    chart = Chart(name, f"Expert load of {finding.name}", ROW * len(rows) + 50, left=58, right=14, top=8)
    across = (chart.x1 - chart.x0) / width
    for r, (layer, row) in enumerate(rows.items()):
        chart.add("text", "tick end", f"layer {layer}", x=chart.x0 - 7, y=chart.y1 + ROW * r + 14)
        for e, load in enumerate(row):
            tip = f"layer {layer}, expert {e}: {load:.2f} of the even load"
            _cell(chart, chart.x0 + across * e, chart.y1 + ROW * r, max(across - 1, 0.5), load, tip)
    for e in range(0, width, max(1, math.ceil(width / 12))):
        chart.add("text", "tick mid", str(e), x=chart.x0 + across * (e + 0.5), y=chart.y0 + 15)
    chart.add("text", "name mid", "expert", x=(chart.x0 + chart.x1) / 2, y=chart.height - 6)
    flat = [load for row in rows.values() for load in row]
    caption = (
        f"What went to each expert over the even share, mean of {seeds(len(loads))}: from {min(flat):.2f} to "
        f"{max(flat):.2f}. Pale is even; blue is less, orange is more, full at nothing and at twice."
    )
    return Figure(chart, f"{finding.name}: load of the experts", caption)


def _mean_loads(loads: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Layer → load of each expert over the even load, for the layers that all runs have alike."""
    if not loads:
        return {}
    alike = [k for k, first in loads[0].items() if all(len(load.get(k, ())) == len(first) > 0 for load in loads)]
    columns = {layer: list(zip(*(load[layer] for load in loads), strict=True)) for layer in alike}
    return {k: [math.fsum(c) / len(c) * len(columns[k]) for c in columns[k]] for k in alike}


def _cell(chart: Chart, x: float, y: float, width: float, load: float, tip: str) -> None:
    for cls, opacity in (("frame", 1.0), ("over" if load > 1 else "under", min(1.0, abs(load - 1)))):
        told = tip if cls != "frame" else ""
        chart.add("rect", cls, tip=told, x=x, y=y, width=width, height=ROW - 1.0, fill_opacity=opacity)
