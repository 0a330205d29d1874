"""What was seen of a control, and whether an instrument that sees this passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockwright.lab.calibration.control import Control
from blockwright.lab.statistics.intervals import LEVEL, compare

MOST_FALSE = 1  # absent effects that may be seen: each is, by chance, one time in twenty


@dataclass(frozen=True)
class Outcome:
    """What was seen of a control.

    Args:
        name, about, expect, least: of the control
        seeds: pairs of runs
        mean: difference of the losses, arm − baseline, in nats; None if a run diverged
        half: half the width of its 95 % interval; None for one pair
        p: of a paired t-test; None for one pair
        seen: ``worse``, ``better``, ``none``, ``identical``, or ``diverged``
    """

    name: str
    about: str
    expect: str
    least: float
    seeds: int
    mean: float | None
    half: float | None
    p: float | None
    seen: str

    @property
    def is_effect(self) -> bool:
        return self.expect in ("worse", "better")

    @property
    def is_different(self) -> bool:
        """Whether a difference was seen."""
        return self.seen not in ("none", "identical")

    @property
    def passes(self) -> bool:
        """Whether it is what is known: of an effect its direction and its size."""
        if self.is_effect:
            return self.seen == self.expect and self.mean is not None and abs(self.mean) >= self.least
        return self.seen == "identical" or (self.expect == "absent" and not self.is_different)


def judge(control: Control, losses: Mapping[tuple[str, ...], float]) -> Outcome | None:
    """What the losses of a control's runs say; None if some are missing.

    Args:
        control: the comparison
        losses: overrides of a run → its loss
    """
    pairs = list(control.pairs())
    if any(run not in losses for pair in pairs for run in pair):
        return None
    baseline, arm = ({i: losses[pair[side]] for i, pair in enumerate(pairs)} for side in (0, 1))
    known = (control.name, control.about, control.expect, control.least, len(pairs))
    if not all(map(math.isfinite, (*baseline.values(), *arm.values()))):
        return Outcome(*known, None, None, None, "diverged")
    found = compare(arm, baseline)
    assert found is not None  # there are pairs
    return Outcome(
        *known, found.difference.mean, found.difference.half, found.p, _seen(found.by_seed.values(), found.p)
    )


def _seen(differences: Any, p: float | None) -> str:
    each = list(differences)
    if not any(each):
        return "identical"
    if p is None or p >= 1 - LEVEL:
        return "none"
    return "worse" if math.fsum(each) > 0 else "better"


@dataclass(frozen=True)
class Summary:
    """Which effects were seen, and which controls failed.

    Args:
        outcomes: of all controls that were run
    """

    outcomes: Sequence[Outcome]

    @property
    def missed(self) -> list[Outcome]:
        """Known effects that were not found."""
        return [each for each in self.outcomes if each.is_effect and not each.passes]

    @property
    def false(self) -> list[Outcome]:
        """Absent effects that were seen."""
        return [each for each in self.outcomes if not each.is_effect and not each.passes]

    @property
    def passes(self) -> bool:
        """Whether every effect was found, at most one absent one was seen, and what computes the same is the same.

        A comparison of the same computation has no noise, so that no difference of it is chance.
        """
        certain = any(each.expect == "identical" for each in self.false)
        return bool(self.outcomes) and not self.missed and len(self.false) <= MOST_FALSE and not certain

    @property
    def counts(self) -> str:
        """``8 of 8 known effects found, 0 of 4 absent ones``"""
        effects = sum(each.is_effect for each in self.outcomes)
        absent = len(self.outcomes) - effects
        return (
            f"{effects - len(self.missed)} of {effects} known effects found, {len(self.false)} of {absent} absent ones"
        )

    @property
    def sentence(self) -> str:
        """Of a report."""
        if self.passes:
            return f"Calibrated on this machine: {self.counts}."
        wrong = ", ".join(each.name for each in (*self.missed, *self.false))
        return f"Not calibrated on this machine: {self.counts} (wrong: {wrong})."
