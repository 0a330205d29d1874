"""What was seen of a control, and whether an instrument that sees this passes.

The verdicts are those of ``lab.report``: pooled noise, Holm, looks and what tuning leaves are as in every ablation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockwright.lab.ablation.definition import Overrides
from blockwright.lab.calibration.control import Control
from blockwright.lab.report.findings import Finding, find
from blockwright.lab.report.verdict import Verdict, verdict
from blockwright.lab.statistics.intervals import LEVEL

CHANCE = 0.05  # with which a sound instrument may see more absent effects than it is allowed
NOT_COVERED = "the matching of arms, noise of earlier sweeps and the runner of sweeps"


@dataclass(frozen=True)
class Outcome:
    """What was seen of a control.

    Args:
        name, about, expect, least, covers: of the control
        seeds: of each arm, in each repeat
        repeats: comparisons; of several arms all at once are one
        wrong: comparisons whose verdict is not what is known
        mean: difference of the losses, arm − baseline, in nats, of the verdict that is furthest from what is known;
            None if a run diverged
        low, high: its interval; None without one
        p: after Holm's correction; None without a test
        seen: ``worse``, ``better``, ``same``, ``undecided``, ``identical``; ``none`` if no verdict was given
    """

    name: str
    about: str
    expect: str
    least: float
    covers: tuple[str, ...]
    seeds: int
    repeats: int
    wrong: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    seen: str

    @property
    def is_effect(self) -> bool:
        return self.expect in ("worse", "better")

    @property
    def is_absent(self) -> bool:
        return self.expect == "absent"


def judge(control: Control, losses: Mapping[Overrides, float]) -> Outcome | None:
    """What the losses of a control's runs say; None if some are missing.

    Args:
        control: the comparison
        losses: overrides of a run → its loss
    """
    sweeps = control.sweeps(losses)
    if any(run.is_pending for sweep in sweeps for run in sweep.runs):
        return None
    wrong, every = 0, []
    for findings in map(find, sweeps):
        said = [(arm, verdict(arm, findings)) for arm in findings.others]
        wrong += not all(_is_known(arm, each, control) for arm, each in said)
        every += said
    sign = -1 if control.is_effect else 1  # of an effect the least certain verdict, else the most certain one
    arm, worst = min(every, key=lambda pair: (_is_known(pair[0], pair[1], control), sign * _p(pair[1])))
    low, high = worst.interval or (None, None)
    return Outcome(
        control.name,
        control.about,
        control.expect,
        control.least,
        control.covers,
        len(control.seeds),
        control.repeats,
        wrong,
        worst.difference,
        low,
        high,
        worst.p,
        _seen(arm, worst),
    )


def _p(of: Verdict) -> float:
    return 1.0 if of.p is None else of.p


def _seen(arm: Finding, of: Verdict) -> str:
    if of.kind == "same" and arm.comparison is not None and not any(arm.comparison.by_seed.values()):
        return "identical"
    return of.kind


def _is_known(arm: Finding, of: Verdict, control: Control) -> bool:
    """Whether a verdict is what is known: of an effect its direction and its size."""
    if control.is_effect:
        return of.kind == control.expect and of.difference is not None and abs(of.difference) >= control.least
    return _seen(arm, of) in (("identical",) if control.expect == "identical" else ("identical", "same", "undecided"))


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
        return [each for each in self.outcomes if each.is_effect and each.wrong]

    @property
    def false(self) -> list[Outcome]:
        """Absent effects that were seen."""
        return [each for each in self.outcomes if each.is_absent and each.wrong]

    @property
    def unlike(self) -> list[Outcome]:
        """What computes the same, and differs. It has no noise, so that no difference of it is chance."""
        return [each for each in self.outcomes if each.expect == "identical" and each.wrong]

    @property
    def absent(self) -> int:
        """Comparisons of equal arms."""
        return sum(each.repeats for each in self.outcomes if each.is_absent)

    @property
    def allowed(self) -> int:
        """Absent effects that may be seen: more are seen by a sound instrument once in twenty calibrations."""
        from scipy.stats import binom

        return int(binom.ppf(1 - CHANCE, self.absent, 1 - LEVEL)) if self.absent else 0

    @property
    def passes(self) -> bool:
        """Whether every effect was found, few absent ones were seen, and what computes the same is the same."""
        few = sum(each.wrong for each in self.false) <= self.allowed
        return bool(self.outcomes) and not self.missed and few and not self.unlike

    @property
    def counts(self) -> str:
        """``9 of 9 known effects found, the smallest of 0.0098 nats; 0 of 15 absent ones seen, of which 2 may be``"""
        effects = [each for each in self.outcomes if each.is_effect]
        found = [abs(each.mean) for each in effects if not each.wrong and each.mean is not None]
        text = f"{len(effects) - len(self.missed)} of {len(effects)} known effects found"
        if found:
            text += f", the smallest of {min(found):.2g} nats"
        seen = sum(each.wrong for each in self.false)
        return f"{text}; {seen} of {self.absent} absent ones seen, of which {self.allowed} may be"

    @property
    def sentence(self) -> str:
        """Of a report."""
        if not self.passes:
            wrong = ", ".join(each.name for each in (*self.missed, *self.false, *self.unlike))
            return f"Not calibrated on this machine: {self.counts} (wrong: {wrong})."
        parts = dict.fromkeys(part for each in self.outcomes for part in each.covers)
        covered = " and ".join(
            filter(None, (", ".join(("training", "paired tests", *list(parts)[:-1])), *list(parts)[-1:]))
        )
        return f"Calibrated on this machine: {self.counts}. It covers {covered}, not {NOT_COVERED}."
