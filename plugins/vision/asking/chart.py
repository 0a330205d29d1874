"""The chart of what a model sees: accuracy by kind of question, and pictures with question, answer and truth."""

from __future__ import annotations

from blockwright.lab.report.svg import LINE, Chart, cut
from blockwright.plugins.vision.asking.found import Accuracy, Found, Sample

COLUMNS = 3  # of samples
SIDE = 92  # pixels of a sample's picture at most
ROW = 20  # pixels of a line of accuracy
LETTERS = 20  # of a line below a sample


def sights(found: Found, name: str = "pictures", heading: str = "answers about pictures") -> Chart:
    """A bar for each figure of each kind of question, thin ones for pictures blanked and shuffled; below, samples."""
    bars = [each for each in found.accuracies.get("whole", []) if not each.group]
    deep = [max(len(sample.turns) for sample in found.samples[i : i + COLUMNS]) for i in _rows(found)]
    top = 22 + ROW * len(bars) + 16
    height = top + sum(SIDE + 8 + 2 * LINE * turns + 10 for turns in deep)
    chart = Chart(name, heading, height, left=96, right=92, top=22, bottom=10)
    chart.add("text", "name", _legend(found), x=4.0, y=13.0)
    for i, each in enumerate(bars):
        _bar(chart, each, found, chart.y1 + ROW * i)
    for i, turns in zip(_rows(found), deep, strict=True):
        for column, sample in enumerate(found.samples[i : i + COLUMNS]):
            _sample(chart, sample, 6 + column * (428 // COLUMNS), top)
        top += SIDE + 8 + 2 * LINE * turns + 10
    return chart


def _rows(found: Found) -> range:
    return range(0, len(found.samples), COLUMNS)


def _legend(found: Found) -> str:
    others = [shown for shown in found.accuracies if shown != "whole"]
    return "right answers" + (f"; thin: pictures {', '.join(others)}" if others else "")


def _bar(chart: Chart, each: Accuracy, found: Found, y: float) -> None:
    across = chart.x1 - chart.x0
    tip = f"{each.kind}, {each.figure}: {each.mean:.3f} ± {each.half:.3f} of {each.n} answers"
    chart.add("text", "tick end", f"{each.kind}: {each.figure}", x=chart.x0 - 7, y=y + 12)
    chart.add("rect", "under", tip=tip, x=chart.x0, y=y + 1, width=across * each.mean, height=9)
    others = [rows for shown, rows in found.accuracies.items() if shown != "whole"]
    for i, rows in enumerate(others):
        means = [o.mean for o in rows if (o.kind, o.figure, o.group) == (each.kind, each.figure, "")]
        chart.add("rect", "over", x=chart.x0, y=y + 11 + 3 * i, width=across * sum(means), height=2)
    chart.add("rect", "frame", x=chart.x0, y=y + 1, width=across, height=9)
    chart.add("text", "", f"{100 * each.mean:.1f} ± {100 * each.half:.1f} %", x=chart.x1 + 6, y=y + 11)


def _sample(chart: Chart, sample: Sample, x: float, y: float) -> None:
    chart.add("image", "pixels", x=x, y=y, width=SIDE, height=SIDE, href=sample.picture)
    chart.add("rect", "frame", x=x, y=y, width=SIDE, height=SIDE)
    for i, (question, answer, truth) in enumerate(sample.turns):
        at, right = y + SIDE + 8 + 2 * LINE * i + 6, answer == truth
        tip = f"{question} answered {answer!r}, truth {truth!r}"
        chart.add("text", "tick", cut(question, LETTERS), tip=tip, x=x, y=at)
        said = " ≠ ".join(text.replace(" ", "␣") for text in ((answer,) if right else (answer, truth)))
        chart.add("text", "" if right else "wrong", cut(said, LETTERS), tip=tip, x=x, y=at + LINE)
