"""The tables and charts of a ladder's report."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields

from blockwright.lab.ladder.findings import Findings, of_rungs, over_all
from blockwright.lab.ladder.verdict import Speed, Verdict
from blockwright.lab.report.svg import (
    AT_END,
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
from blockwright.lab.report.tables import Table, row
from blockwright.lab.report.words import around, bare, plain, short, signed
from blockwright.lab.statistics.law import Rung
from blockwright.lab.statistics.law_check import Conclusion
from blockwright.lab.statistics.law_fit import Estimate, Line, best_split, speed_up_along
from blockwright.lab.statistics.tuning import ENDS


def _speed(log_s: Estimate | None) -> str:
    return "–" if log_s is None else str(Speed.of(log_s))


def speed(findings: Findings, found: Sequence[Verdict]) -> Table | None:
    """s of each arm in several measures."""
    law = findings.law
    if law is None or law.is_wrong:
        return None
    places = ("same tokens a parameter", "same size")
    columns = ("arm", "s, best split", "size ρ_N", "data ρ_D", *places, "at equal FLOPs", "by the clock")
    largest = findings.largest_rung
    lines = []
    for verdict in found:
        if verdict.speed_up is None:
            continue
        best = Speed.of(law.fit.speed_up(verdict.arm))
        apart = law.fit.apart(verdict.arm) if law.why_alike is None else (None, None)
        along = [_along(law, verdict.arm, largest, "ratio"), _along(law, verdict.arm, largest, "data")]
        clock = "–" if verdict.by_clock is None else str(verdict.by_clock)
        lines.append(row(verdict.arm, str(best), *map(_speed, apart), *along, str(verdict.at_equal_flops), clock))
    where = _verdicts_at(found, findings, law)
    note = (
        f"How many times the compute {findings.baseline} needs for the same loss. At the best split of it into size "
        "and data, at every budget, s = ρ_N ρ_D; at the largest rung, if the baseline grows at its tokens per "
        f"parameter, or sees more tokens at its size. {where} At equal FLOPs: × the ratio of training FLOPs "
        "a token and parameter at the largest size; by the clock: × the ratio of measured tokens × parameters a second "
        "there."
    )
    return Table("Speed-up", columns, tuple(lines), frozenset(columns[1:]), note=note) if lines else None


def _verdicts_at(found: Sequence[Verdict], findings: Findings, law: Conclusion) -> str:
    """Where the verdicts are, and why."""
    if all(verdict.at != "tokens per parameter" for verdict in found):
        return "Verdicts are at the best split."
    largest = findings.largest_rung
    parameters, tokens = map(short, best_split(law.fit, 6 * largest.parameters * largest.tokens))
    return (
        f"Verdicts are at the same tokens a parameter: the best split of the largest rung's compute, {parameters} "
        f"parameters and {tokens} tokens, lies outside of the ladder, where ρ_N and ρ_D are extrapolated."
    )


def _along(law: Conclusion, arm: str, rung: Rung, line: Line) -> str:
    found = speed_up_along(law.fit, arm, rung.parameters, rung.tokens, line)
    return str(Speed(found.mean, found.low, found.high))


def residual(findings: Findings) -> Table | None:
    """Mean residual by arm and size."""
    if findings.law is None:
        return None
    sizes = list(findings.outline.sizes)
    pairs = list(zip(findings.law.fit.ladder.rungs, findings.law.fit.residuals, strict=True))
    lines = []
    for arm in findings.arms:
        own = [[float(off) for rung, off in pairs if rung.arm == arm and rung.size == size] for size in sizes]
        lines.append(row(arm, *(signed(math.fsum(each) / len(each), 4) if each else "–" for each in own)))
    return Table("Mean residual, nats", ("arm", *sizes), tuple(lines), frozenset(sizes))


def difference(findings: Findings) -> Table:
    """Each arm against the baseline at every rung, and at all together."""
    lines = []
    for arm in findings.arms[1:]:
        all_rungs = over_all(findings, arm)
        found = [(*place, each) for place, each in of_rungs(findings, arm).items()]
        for size, duration, each in [*([("all", "all", all_rungs)] if all_rungs else []), *found]:
            lines.append(row(arm, size, duration, around(each.interval, sign=True), bare(each.p), str(each.interval.n)))
    columns = ("arm", "size", "duration", "difference", "p", "seeds")
    note = (
        f"Arm minus {findings.baseline} in nats over common seeds, with its 95 % interval, by the noise of all "
        "trainings together and what tuning leaves; p of each alone."
    )
    return Table("Differences a rung", columns, tuple(lines), frozenset(columns[3:]), note=note)


def tuning(findings: Findings) -> Table | None:
    """What the tries of each arm at each size led to."""
    lines = []
    for (size, arm), of in findings.tuned.items():
        edge = f"best is the {ENDS[of.fit.edge]}" if of.fit.edge else ""
        regret = "–" if math.isinf(of.fit.regret) else plain(of.fit.regret, 4)
        curvature = "–" if math.isinf(of.fit.curvature) else plain(of.fit.curvature, 3)
        values = sorted(each.value for each in of.tries)
        tried = f"{len(values)}: {values[0]:.3g} to {values[-1]:.3g}"
        lines.append(row(arm, size, tried, f"{of.fit.vertex:.3g}", curvature, regret, edge))
    columns = ("arm", "size", "tries", "best", "nats an octave²", "regret", "note")
    note = (
        f"Of {findings.outline.tune}, by the mean loss of the durations that it was tried at, of one seed that is not "
        "compared. Larger sizes follow from an arm's mean along a "
        "slope that all arms share."
    )
    return Table("Tuning", columns, tuple(lines), frozenset(columns[3:6]), note=note) if lines else None


def lost(findings: Findings) -> Table | None:
    lines = [row(str(each.job), each.name, each.reason) for each in findings.lost if not each.is_unfinished]
    columns = ("job", "training", "reason")
    return Table("Lost trainings", columns, tuple(lines), wide=frozenset({"reason"})) if lines else None


def rows(findings: Findings) -> str:
    """The rungs as CSV."""
    file = io.StringIO()
    writer = csv.writer(file)
    names = [field.name for field in fields(Rung)]
    writer.writerow(names)
    writer.writerows([getattr(rung, name) for name in names] for rung in findings.rungs)
    return file.getvalue()


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
    left = 16 + LETTER * max(len(cut(v.arm, AT_END)) for v, *_ in shown)
    chart = Chart("speed-ups", f"Speed-up against {findings.baseline}", row * len(shown) + 66, left=left, top=22)
    reach = [end for _, *both in shown for each in both for end in _reach(each)]
    x = Scale(*padded([1.0, *reach]), chart.x0, chart.x1)
    chart.axes(x, None, "speed-up in compute (right is better)", written=lambda v: f"{v:g}")
    chart.add("line", "zero", x1=x(1), x2=x(1), y1=chart.y1 - 4, y2=chart.y0)
    for i, (verdict, own, equal) in enumerate(shown):
        at, cls = chart.y1 + row * (i + 0.5), colour(verdict.arm, findings)
        chart.add("line", "grid", x1=chart.x0, x2=chart.x1, y1=at, y2=at)
        chart.add("text", "end", cut(verdict.arm, AT_END), tip=verdict.arm, x=chart.x0 - 9, y=at + 4)
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
