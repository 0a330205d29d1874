"""Loss curves: over tokens, over FLOPs, against the baseline, over trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.svg import RING, Chart, Figure, Point, Scale, colour, cut, end_labels, label_room, padded
from blockwright.lab.report.sweep import Run
from blockwright.lab.report.words import plain, seeds, short

Points = list[Point]
EARLY = 0.25  # fraction of a run whose fast fall of the loss would compress the rest of the axis


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


ROW = 20  # pixels of a layer


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


def load_map(name: str, title: str, rows: Mapping[str, Sequence[float]]) -> Chart:
    """A row of cells per layer, an expert each, coloured by its load relative to the even load."""
    width = max(map(len, rows.values()))
    chart = Chart(name, title, ROW * len(rows) + 50, left=58, right=14, top=8)
    across = (chart.x1 - chart.x0) / width
    for r, (layer, row) in enumerate(rows.items()):
        chart.add("text", "tick end", f"layer {layer}", x=chart.x0 - 7, y=chart.y1 + ROW * r + 14)
        for e, load in enumerate(row):
            tip = f"layer {layer}, expert {e}: {load:.2f} of the even load"
            _cell(chart, chart.x0 + across * e, chart.y1 + ROW * r, max(across - 1, 0.5), load, tip)
    for e in range(0, width, max(1, math.ceil(width / 12))):
        chart.add("text", "tick mid", str(e), x=chart.x0 + across * (e + 0.5), y=chart.y0 + 15)
    chart.add("text", "name mid", "expert", x=(chart.x0 + chart.x1) / 2, y=chart.height - 6)
    return chart


def _mean_loads(loads: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Layer → load of each expert relative to the even load, for layers equal in all runs."""
    if not loads:
        return {}
    alike = [k for k, first in loads[0].items() if all(len(load.get(k, ())) == len(first) > 0 for load in loads)]
    columns = {layer: list(zip(*(load[layer] for load in loads), strict=True)) for layer in alike}
    return {k: [math.fsum(c) / len(c) * len(columns[k]) for c in columns[k]] for k in alike}


def _cell(chart: Chart, x: float, y: float, width: float, load: float, tip: str) -> None:
    for cls, opacity in (("frame", 1.0), ("over" if load > 1 else "under", min(1.0, abs(load - 1)))):
        label = tip if cls != "frame" else ""
        chart.add("rect", cls, tip=label, x=x, y=y, width=width, height=ROW - 1.0, fill_opacity=opacity)
