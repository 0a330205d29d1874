"""Loss curves, over tokens, over FLOPs, against the baseline, over trials; and the tries of a tuned setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.report.findings import Finding, Findings, Tuned
from blockwright.lab.report.svg import (
    EARLY,
    RING,
    Chart,
    Figure,
    Point,
    Scale,
    colour,
    cut,
    end_labels,
    label_room,
    load_map,
    padded,
)
from blockwright.lab.report.sweep import Run
from blockwright.lab.report.words import plain, seeds, short
from blockwright.lab.statistics.tuning import Bands
from blockwright.lab.statistics.tuning import bands as bands_of

Points = list[Point]


def curves(findings: Findings, over: str) -> Figure | None:
    """Validation loss over tokens or FLOPs: a thin line per seed, a thick one for their mean, dashes for a lost run."""
    lines = {f.name: [(run, _line(run, over)) for run in f.runs] for f in findings.arms}
    kept = [(run, line) for found in lines.values() for run, line in found if len(line) > 1]
    whole = [line for run, line in kept if run.result.value(findings.sweep.metric) is not None]
    if not whole:
        return None
    end = max(line[-1][0] for line in whole)
    late = [loss for line in whole for at, loss in line if at >= EARLY * end] or [line[-1][1] for line in whole]
    what = "tokens" if over == "tokens" else "training FLOPs"
    chart = Chart(f"loss-over-{over}", f"Validation loss over {what}", 300, right=label_room(findings), top=30)
    x = Scale(0, end, chart.x0, chart.x1)
    y = Scale(*padded(late), chart.y0, chart.y1)
    chart.axes(x, y, what, f"validation loss, {findings.sweep.unit_of('val/loss')}".rstrip(", "), short)
    ends = [_arm_lines(chart, f, lines[f.name], findings) for f in findings.arms]
    end_labels(chart, [end for end in ends if end])
    caption = (
        "The same, over the computation that was spent."
        if over == "flops"
        else (
            "Thick: the mean over seeds; thin: each seed; dashed: a run that was lost. The loss axis ends at what was "
            "reached after a quarter of the tokens. The points are in each run's curves.json."
        )
    )
    return Figure(chart, f"Loss over {what}", caption)


def gaps(findings: Findings) -> Figure | None:
    """The arms' validation loss minus the baseline's of the same seed at the same tokens, mean over seeds."""
    baseline = {run.seed: dict(_line(run, "tokens")) for run in findings.baseline.runs}
    lines: dict[str, Points] = {}
    for f in (each for each in findings.others if each.against == findings.baseline.name):
        pairs = [(_line(run, "tokens"), baseline.get(run.seed, {})) for run in f.runs if run.seed in f.values]
        lines[f.name] = _mean([[(at, loss - b[at]) for at, loss in line if at in b] for line, b in pairs if line and b])
    end = max((line[-1][0] for line in lines.values() if len(line) > 1), default=0.0)
    if not end:
        return None
    other = cut(findings.baseline.name, 16)
    title = f"Validation loss minus that of {other} over tokens"
    chart = Chart("gap-over-tokens", title, 300, right=label_room(findings), top=30)
    late = [gap for line in lines.values() for at, gap in line if at >= EARLY * end]
    x, y = Scale(0, end, chart.x0, chart.x1), Scale(*padded([0.0, *late]), chart.y0, chart.y1)
    unit = findings.sweep.unit_of("val/loss")
    chart.axes(x, y, "tokens", f"validation loss minus that of {other}, {unit}".rstrip(", "), short)
    chart.curve([(0, 0), (end, 0)], "zero")
    ends = [(findings.baseline.name, "s0", (end, 0.0))]
    for f in findings.others:
        if line := lines.get(f.name):
            chart.curve(line, f"curve {colour(f, findings)}", f.name)
            ends.append((f.name, colour(f, findings), line[-1]))
    end_labels(chart, ends)
    caption = f"Below the line: better than {other} at the same tokens. Whether a gap still grows shows here first."
    return Figure(chart, f"Gap to {findings.baseline.name}", caption)


def _line(run: Run, over: str) -> Points:
    each = 1.0 if over == "tokens" else run.curves.get("flops_per_token")
    points = run.loss_over_tokens()
    return [(tokens * each, loss) for tokens, loss in points if math.isfinite(loss)] if each else []


def _arm_lines(
    chart: Chart, finding: Finding, lines: list[tuple[Run, Points]], findings: Findings
) -> tuple[str, str, Point] | None:
    """Draw an arm's lines; returns its name, colour and end, for the label."""
    at = colour(finding, findings)
    good = [line for run, line in lines if run.seed in finding.values and len(line) > 1]
    for run, line in lines:
        kind = "seed" if run.seed in finding.values else "lost"
        if kind == "lost" or len(good) > 1:
            tip = f"{finding.name}, seed {run.seed}, job {run.job}"
            chart.curve(line, f"curve {kind} {at}", tip)
    mean = _mean(good)
    chart.curve(mean, f"curve {at}", finding.name)
    return (finding.name, at, mean[-1]) if mean else None


def _mean(lines: Sequence[Points]) -> Points:
    """Mean of the lines at their common points."""
    if not lines:
        return []
    maps = [dict(line) for line in lines]
    shared = sorted(set.intersection(*(set(m) for m in maps)))
    return [(at, math.fsum(m[at] for m in maps) / len(maps)) for at in shared]


def search(findings: Findings) -> Figure | None:
    """Each trial's figure, and the best so far."""
    metric, sign = findings.sweep.metric, -1 if findings.sweep.maximize else 1
    done = [(run.job, v) for run in findings.sweep.runs if (v := run.result.value(metric)) is not None]
    if len(done) < 2:
        return None
    chart = Chart("search", f"{metric} of each trial, and the best so far", 300, right=24, top=30)
    order = sorted(v * sign for _, v in done)
    worst = order[min(len(order) - 1, math.ceil(0.9 * len(order)))]
    x = Scale(*padded([job for job, _ in done]), chart.x0, chart.x1, whole=True)
    y = Scale(*padded([sign * order[0], sign * worst]), chart.y0, chart.y1)
    chart.axes(x, y, "trial", metric, lambda v: f"{v:g}")
    best, line = math.inf, []
    for job, value in done:
        chart.mark("ring s8", (job, value), RING, f"trial {job}: {plain(value)}")
        line += [(job, sign * best)] if math.isfinite(best) else []
        best = min(best, sign * value)
        line.append((job, sign * best))
    chart.curve(line, "curve s1", "best so far")
    return Figure(
        chart, "Best so far", "Rings: trials; line: the best until then. The worst tenth may lie beyond the axis."
    )


# --- heat map of the experts' load of an arm --------------------------------------------------------------------------


def experts(index: int, finding: Finding) -> Figure | None:
    """Load of each expert relative to the even load, a row per layer, mean over seeds."""
    loads = [run.curves.get("expert_load") for run in finding.runs if run.seed in finding.values]
    rows = _mean_loads([load for load in loads if load])
    if not rows:
        return None
    chart = load_map(f"experts-{index}", f"Expert load of {finding.name}", rows)
    flat = [load for row in rows.values() for load in row]
    caption = (
        f"What went to each expert over the even share, mean of {seeds(len(loads))}: from {min(flat):.2f} to "
        f"{max(flat):.2f}. Without colour is even; blue is less, orange is more, full at nothing and at twice."
    )
    return Figure(chart, f"{finding.name}: load of the experts", caption)


def _mean_loads(loads: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Layer → load of each expert relative to the even load, for layers equal in all runs."""
    if not loads:
        return {}
    alike = [k for k, first in loads[0].items() if all(len(load.get(k, ())) == len(first) > 0 for load in loads)]
    columns = {layer: list(zip(*(load[layer] for load in loads), strict=True)) for layer in alike}
    return {k: [math.fsum(c) / len(c) * len(columns[k]) for c in columns[k]] for k in alike}


# --- how much the tries of a setting have gained: the best of k of them, with opda's bands ----------------------------


def bands(findings: Findings, path: str) -> Figure | None:
    """Median of the best loss of k tries, a line an arm, between thin lines; None without opda, or of gains."""
    tuned = {f.name: each for f in findings.arms for each in f.tuned if each.path == path}
    aim = findings.sweep.aim
    curves = {} if aim.maximize else {name: found for name, each in tuned.items() if (found := _bands(each))}
    shown = [f for f in findings.arms if f.name in curves]
    if not shown:
        return None
    ends = [loss for curve in curves.values() for loss in curve.point]
    most = max(len(curve.point) for curve in curves.values())
    name = next(iter(tuned.values())).name
    title = f"{aim.metric} of the best of k values of the {name}"
    chart = Chart(f"best-of-{path.replace('.', '-')}", title, 280, right=label_room(findings), top=30)
    x, y = Scale(1, most, chart.x0, chart.x1, whole=True), Scale(*padded(ends, 0.3), chart.y0, chart.y1)
    chart.axes(x, y, "tries", f"{aim.metric} of the best of them")
    for f in shown:
        for cls, losses in (("curve seed", curves[f.name].low), ("curve seed", curves[f.name].high)):
            chart.curve(_point_line(losses), f"{cls} {colour(f, findings)}", f.name)
        chart.curve(_point_line(curves[f.name].point), f"curve {colour(f, findings)}", f.name)
    end_labels(chart, [(f.name, colour(f, findings), _point_line(curves[f.name].point)[-1]) for f in shown])
    caption = (
        "Median of the best of so many tries, between bands that hold the whole curve in 95 % (opda), as if the values "
        "had been drawn at random. Where a line still falls, more tries would help. Nothing is tested by it."
    )
    return Figure(chart, "What tuning gained", caption)


def _bands(tuned: Tuned) -> Bands | None:
    return None if tuned.pending else bands_of([each.loss for each in tuned.tries])


def _point_line(losses: tuple[float, ...]) -> list[Point]:
    return [(k, loss) for k, loss in enumerate(losses, 1) if math.isfinite(loss)]


STEPS = 24  # of a drawn parabola
OCTAVES = 1.0  # drawn on either side of its vertex
SHOWN = 3  # best tries of each arm that the axis has room for
LEAST_ROOM = 0.01  # share of the loss; a flat curve is not magnified into noise


def paths(findings: Findings) -> list[str]:
    """The settings that were tuned."""
    return list(dict.fromkeys(each.path for f in findings.arms for each in f.tuned))


def tuning(findings: Findings, path: str) -> Figure | None:
    """Figure over setting: a ring per try, the fitted curve, a dot at the value at which the arm is compared."""
    aim = findings.sweep.aim
    tuned = {f.name: each for f in findings.arms for each in f.tuned if each.path == path}
    points = {name: _points(each, aim.maximize) for name, each in tuned.items()}
    every = [point for found in points.values() for point in found]
    if len({value for value, _ in every}) < 2:
        return None
    name, metric = next(iter(tuned.values())).name, aim.metric
    named = "learning rate" if name == "rate" else name
    chart = Chart(f"tuning-{path.replace('.', '-')}", f"{metric} over {named}", 280, right=label_room(findings), top=30)
    values = [value for value, _ in every]
    x = Scale(min(values) / 1.15, max(values) * 1.15, chart.x0, chart.x1, log=True)
    near = [figure for found in points.values() for figure in _best(found, aim.maximize)]
    y = Scale(*padded(near, least=LEAST_ROOM), chart.y0, chart.y1)
    chart.axes(x, y, named, metric, lambda v: f"{v:g}")
    for f in findings.arms:
        if f.name in tuned:
            _arm(chart, f.name, tuned[f.name], points[f.name], colour(f, findings), aim.maximize)
    end_labels(chart, [(f.name, colour(f, findings), points[f.name][-1]) for f in findings.arms if points.get(f.name)])
    caption = (
        "Rings: tries, the worst of which may be beyond the axis. Line: the curve through the best of them, over "
        "octaves; thin where the best is the last one tried. Filled: where the arm is compared."
    )
    return Figure(chart, f"Tuning of the {named}", caption)


def _points(tuned: Tuned, maximize: bool) -> list[Point]:
    """(value, figure) of the tries that ended well."""
    return [(each.value, -each.loss if maximize else each.loss) for each in tuned.tries if math.isfinite(each.loss)]


def _best(points: list[Point], maximize: bool) -> list[float]:
    """The best figures of an arm; a curve that falls far would leave no room for the others."""
    return sorted((figure for _, figure in points), reverse=maximize)[:SHOWN]


def _arm(chart: Chart, name: str, tuned: Tuned, points: list[Point], cls: str, maximize: bool) -> None:
    for value, figure in points:
        chart.mark(f"ring {cls}", (value, figure), RING, f"{name}, {value:.3g}: {plain(figure)}")
    fit = tuned.fit
    if fit is None or tuned.edge:
        chart.curve(points, f"curve seed {cls}", name)
        return

    def at(value: float) -> Point:
        return value, bottom + curvature * math.log2(value / fit.vertex) ** 2

    curvature = -fit.curvature if maximize else fit.curvature
    # The figure at the vertex: of the parabola that fits the three tries nearest to it
    near = sorted((abs(math.log2(value / fit.vertex)), figure) for value, figure in points)[:3]
    bottom = math.fsum(figure - curvature * octaves**2 for octaves, figure in near) / len(near)
    values = [fit.vertex * 2 ** (OCTAVES * (2 * i / STEPS - 1)) for i in range(STEPS + 1)]
    chart.curve([at(value) for value in values if chart.x.low <= value <= chart.x.high], f"curve {cls}", name)
    if tuned.used is not None:
        chart.mark(f"dot {cls}", at(tuned.used), 5.0, f"{name}, compared at {tuned.used:.3g}")
