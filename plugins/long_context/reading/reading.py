"""What a reading test found: figures alone, without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FILE = "reading.json"  # of a run


@dataclass
class Reading:
    """What one test found.

    Args:
        test: its name
        lengths: tokens of the prompts
        depths: empty for a test without depths, whose rows have one value
        teacher_forced: share of the answers' tokens that are the likeliest, given the right ones before; a row per
            length, a value per depth
        generated: share of the answers that occur in a greedily generated text of their length; None if not measured
    """

    test: str
    lengths: list[int]
    depths: list[float]
    teacher_forced: list[list[float]] = field(default_factory=list)
    generated: list[list[float]] | None = None

    def mean(self, length: int) -> float:
        """The mean over depths at a length."""
        row = self.teacher_forced[self.lengths.index(length)]
        return sum(row) / len(row)

    def as_plain(self) -> dict[str, Any]:
        return dict(vars(self))
