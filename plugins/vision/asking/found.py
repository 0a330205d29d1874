"""What was found by asking about pictures: figures by kind of question and by group, and samples to look at."""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright.lab.statistics.intervals import interval, wilson
from blockwright.registry.folder import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from blockwright.plugins.vision.asking.measure import Answer  # with torch, which a report does not need

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
