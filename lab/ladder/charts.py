"""The charts of a ladder: losses and the law over size and over data, residuals, speed-ups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from blockwright.lab.ladder.findings import Findings
from blockwright.lab.ladder.verdict import Speed, Verdict
from blockwright.lab.report.svg import (
    ENDS,
    LETTER,
    Chart,
    Figure,
    Point,
    Scale,
    colour_of,
    cut,
    end_labels,
    padded,
    room_of,
)
from blockwright.lab.report.words import plain, short, signed
from blockwright.lab.statistics.law import Rung

MEAN, POINTS = 4.0, 24  # pixels of a mean's radius; points of a drawn law
Cells = dict[tuple[str, str, str], list[Rung]]  # (arm, size, duration) → its seeds


def colour(arm: str, findings: Findings) -> str:
    """Class of an arm's colour: the baseline is drawn in ink."""
    return colour_of(findings.arms.index(arm))


def cells(findings: Findings) -> Cells:
    found: Cells = defaultdict(list)
    for rung in findings.rungs:
        found[rung.arm, rung.size, rung.duration].append(rung)
    return dict(found)


def mean(rungs: Sequence[Rung]) -> float:
    return math.fsum(rung.loss for rung in rungs) / len(rungs)


def losses(findings: Findings, over: str) -> Figure:
    """Mean losses, and the law's lines, over N with a line for each duration, or over D with one for each size."""
    by_size = over == "size"
    what = "parameters without embedding and head" if by_size else "tokens"
    sizes = findings.outline.sizes
    names = list(sizes[findings.largest].steps if by_size else sizes)
    of = cells(findings)
    chart = Chart(f"loss-over-{over}", f"Loss over {what}", 320, right=room_of(findings.arms), top=30)
    points = [(_at(each[0], by_size), mean(each)) for each in of.values()]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    x = Scale(low / 1.15, high * 1.15, chart.x0, chart.x1, log=True)
    y = Scale(*padded([loss for _, loss in points]), chart.y0, chart.y1)
    chart.axes(x, y, what, f"{findings.plan['metric']}, nats", short)
    ends = []
    for arm in findings.arms:
        for name in names:
            row = [each for (a, s, d), each in of.items() if a == arm and name == (d if by_size else s)]
            if row:
                end = _row(chart, findings, arm, name, row, by_size)
                ends += [(arm, colour(arm, findings), end)] if name == names[-1] else []
    end_labels(chart, ends)
    lines = "duration" if by_size else "size"
    law = "Lines: the law" if findings.law else "Lines join the rungs of an arm"
    caption = f"Dots: means over seeds, a row for each {lines}. {law}."
    return Figure(chart, f"Loss over {'size' if by_size else 'data'}", caption)


def _row(chart: Chart, findings: Findings, arm: str, name: str, row: Sequence[Sequence[Rung]], by_size: bool) -> Point:
    """Draw an arm at one duration or size: its line, and a dot for each rung. Returns the last dot."""
    cls = colour(arm, findings)
    chart.curve(_line(findings, arm, row, by_size), f"curve {cls}", f"the law: {arm}, {name}")
    for each in row:
        at = _at(each[0], by_size), mean(each)
        chart.mark(f"dot {cls}", at, MEAN, f"{arm}, {each[0].size}, {each[0].duration}: {plain(at[1])}")
    last = max(row, key=lambda each: _at(each[0], by_size))
    return _at(last[0], by_size), mean(last)


def _at(rung: Rung, by_size: bool) -> float:
    return rung.parameters if by_size else rung.tokens


def _line(findings: Findings, arm: str, own: Sequence[Sequence[Rung]], by_size: bool) -> list[Point]:
    """The law through the rungs of an arm; without a law, the rungs themselves."""
    rungs = sorted((each[0] for each in own), key=lambda rung: _at(rung, by_size))
    if findings.law is None:
        return [(_at(each[0], by_size), mean(each)) for each in sorted(own, key=lambda e: _at(e[0], by_size))]
    points = []
    for share in [i / POINTS for i in range(POINTS + 1)]:
        n, d = (_between([getattr(rung, key) for rung in rungs], share) for key in ("parameters", "tokens"))
        points.append((n if by_size else d, findings.law.fit.loss(arm, n, d).mean))
    return points


def _between(values: Sequence[float], share: float) -> float:
    """A value on the way through several, in logs."""
    place = share * (len(values) - 1)
    i = min(int(place), len(values) - 2) if len(values) > 1 else 0
    if len(values) == 1:
        return values[0]
    low, high = math.log(values[i]), math.log(values[i + 1])
    return math.exp(low + (place - i) * (high - low))


def residuals(findings: Findings) -> Figure | None:
    """Measured minus the law: each seed, and the mean of each rung."""
    if findings.law is None:
        return None
    fit = findings.law.fit
    of: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for rung, off in zip(fit.ladder.rungs, fit.residuals, strict=True):
        of[rung.arm, rung.size, rung.duration].append(float(off))
    tokens = {(rung.arm, rung.size, rung.duration): rung.tokens for rung in fit.ladder.rungs}
    chart = Chart("residuals", "Measured minus the law, over tokens", 280, right=24, top=30)
    x = Scale(min(tokens.values()) / 1.3, max(tokens.values()) * 1.3, chart.x0, chart.x1, log=True)
    y = Scale(*padded([0.0, *(off for each in of.values() for off in each)]), chart.y0, chart.y1)
    chart.axes(x, y, "tokens", "measured minus the law, nats", short)
    chart.curve([(x.low, 0), (x.high, 0)], "zero")
    for place, offs in of.items():
        cls, arm = colour(place[0], findings), place[0]
        shift = 1.03 ** (findings.arms.index(arm) - (len(findings.arms) - 1) / 2)
        for off in offs:
            chart.mark(f"ring {cls}", (tokens[place] * shift, off), 2.2, f"{', '.join(place)}: {signed(off, 4)}")
        middle = math.fsum(offs) / len(offs)
        chart.mark(f"dot {cls}", (tokens[place] * shift, middle), MEAN, f"{', '.join(place)}: {signed(middle, 4)}")
    caption = "Rings: seeds; dots: their means. A pattern along an arm, a size or a duration is what the law misses."
    return Figure(chart, "Residuals", caption)


def speed_ups(findings: Findings, found: Sequence[Verdict]) -> Figure | None:
    """s of each arm with its interval, and at equal training FLOPs."""
    shown = [(v, v.speed_up, v.at_equal_flops) for v in found if v.speed_up and v.at_equal_flops]
    if not shown:
        return None
    row = 34
    left = 16 + LETTER * max(len(cut(v.arm, ENDS)) for v, *_ in shown)
    chart = Chart("speed-ups", f"Speed-up against {findings.baseline}", row * len(shown) + 66, left=left, top=22)
    reach = [end for _, *both in shown for each in both for end in _reach(each)]
    x = Scale(*padded([1.0, *reach]), chart.x0, chart.x1)
    chart.axes(x, None, "speed-up in compute (right is better)", written=lambda v: f"{v:g}")
    chart.add("line", "zero", x1=x(1), x2=x(1), y1=chart.y1 - 4, y2=chart.y0)
    for i, (verdict, own, equal) in enumerate(shown):
        at, cls = chart.y1 + row * (i + 0.5), colour(verdict.arm, findings)
        chart.add("line", "grid", x1=chart.x0, x2=chart.x1, y1=at, y2=at)
        chart.add("text", "end", cut(verdict.arm, ENDS), tip=verdict.arm, x=chart.x0 - 9, y=at + 4)
        chart.bar(cls, (x(equal.low), at), (x(min(equal.high, reach_of(x))), at), f"at equal FLOPs {equal}")
        chart.add("circle", f"ring {cls}", cx=x(own.s), cy=at - 8, r=3.2, tip=f"by parameters × tokens {own}")
        chart.add("circle", f"dot {cls}", cx=x(equal.s), cy=at, r=5, tip=f"at equal FLOPs {equal}")
    caption = (
        "Dot and bar: at equal training FLOPs, with its 95 % interval; ring: by parameters × tokens. 1.1: the baseline "
        "needs 1.1 times the compute for the same loss, where the table says."
    )
    return Figure(chart, "Speed-up", caption)


def reach_of(x: Scale) -> float:
    """Far beyond the axis, where an interval without an end is cut."""
    return x.high + 10 * (x.high - x.low)


def _reach(speed: Speed) -> list[float]:
    """An interval far beyond its own value is cut, so that the rest stays visible."""
    return [max(speed.low, speed.s / 2), speed.s, min(speed.high, 2 * speed.s)]
