"""What was found by asking about pictures: figures by kind of question and by group, samples, and what arms say."""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright.lab.report.charts import Drawing, of_each
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.svg import LINE, Chart, Figure, cut
from blockwright.lab.report.sweep import Run
from blockwright.lab.statistics.intervals import interval, wilson
from blockwright.registry.folder import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from blockwright.plugins.vision.asking.measure import Answer

FILE = "pictures.json"  # of a run


@dataclass(frozen=True)
class Accuracy:
    """The mean of a figure over answers, with a 95 % interval.

    Args:
        kind: of the questions
        figure: its name
        group: of the pictures; empty for all
        n: answers
        mean: from 0 to 1
        half: half the width of the interval, over answers
    """

    kind: str
    figure: str
    group: str
    n: int
    mean: float
    half: float


@dataclass(frozen=True)
class Sample:
    """A picture with what was asked about it: (question, answer, truth).

    Args:
        picture: as a data URI of a PNG
        turns: what was asked and answered
    """

    picture: str
    turns: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Found:
    """Of one model.

    Args:
        accuracies: pictures as they are, ``blanked`` or ``shuffled`` → figures
        samples: of pictures as they are
    """

    accuracies: dict[str, list[Accuracy]]
    samples: list[Sample]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, file: Path) -> Found:
        """From the file of a run; an OSError, ValueError, KeyError or TypeError if it is missing or damaged."""
        plain = read_json(file.parent, file.name)
        made = {str(shown): [Accuracy(**each) for each in rows] for shown, rows in dict(plain["accuracies"]).items()}
        turns = [(each["picture"], [tuple(map(str, turn)) for turn in each["turns"]]) for each in plain["samples"]]
        return cls(made, [Sample(str(picture), asked) for picture, asked in turns])  # type: ignore[arg-type]


def accuracies(answers: Sequence[Answer]) -> list[Accuracy]:
    """The figures of every kind of question, over all groups of pictures and of each."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for answer in answers:
        for figure, value in answer.judged.figures.items():
            for group in sorted({"", answer.judged.group}):
                values[answer.judged.kind, figure, group].append(value)
    return [Accuracy(*key, len(found), math.fsum(found) / len(found), _half(found)) for key, found in values.items()]


def _half(values: Sequence[float]) -> float:
    """Half the width of Wilson's interval, that of all right or all wrong too; of shares, of Student's if narrower."""
    n, mean = len(values), math.fsum(values) / len(values)
    _, half = wilson(mean, n)
    spread = interval(values).half if len(set(values)) > 1 else None
    return half if spread is None or set(values) <= {0.0, 1.0} else min(half, spread)


def sample(answers: Sequence[Answer], number: int, pictures: Sequence[Image]) -> Sample | None:
    """A conversation with its first picture; None for one without."""
    turns = [(each.question.replace("<image>", ""), each.answer, each.truth) for each in answers if each.of == number]
    return Sample(_data_uri(pictures[0]), turns) if pictures and turns else None


def _data_uri(picture: Image) -> str:
    file = io.BytesIO()
    small = picture.copy()
    small.thumbnail((256, 256))
    small.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --- the chart of what a model sees -----------------------------------------------------------------------------------


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
    others = [shown for shown in found.accuracies if shown != "whole"]
    legend = "right answers" + (f"; thin: pictures {', '.join(others)}" if others else "")
    chart.add("text", "name", legend, x=4.0, y=13.0)
    for i, each in enumerate(bars):
        _bar(chart, each, found, chart.y1 + ROW * i)
    for i, turns in zip(_rows(found), deep, strict=True):
        for column, sample in enumerate(found.samples[i : i + COLUMNS]):
            _sample(chart, sample, 6 + column * (428 // COLUMNS), top)
        top += SIDE + 8 + 2 * LINE * turns + 10
    return chart


def _rows(found: Found) -> range:
    return range(0, len(found.samples), COLUMNS)


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


def sight(index: int, finding: Finding) -> list[Figure]:
    """Accuracy by kind of question and sampled pictures of the first run of an arm that has asked."""
    for run in finding.runs:
        if run.seed in finding.values and (found := _found(run)):
            chart = sights(found, f"pictures-{index}", f"{finding.name}: answers about pictures")
            caption = f"Seed {run.seed}; ± is a 95 % interval over answers. Samples: the answer, ≠ the truth."
            return [Figure(chart, finding.name, caption)]
    return []


def _found(run: Run) -> Found | None:
    """What a run has found; None if it has not asked, or its file is damaged."""
    try:
        return None if run.folder is None else Found.read(run.folder / FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return None


SIGHT = Drawing("What they see in pictures", of_each(sight))
