"""An arm with the look at its seeds that decides it, or has not yet: the figures of its verdict."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from blockwright.lab.report.evidence import Evidence, Look, Spread
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.sweep import Run, Sweep
from blockwright.lab.statistics import power
from blockwright.lab.statistics.intervals import Comparison
from blockwright.lab.statistics.power import margin_seen

Decision = Literal["better", "worse", "same", "undecided"]


@dataclass(frozen=True)
class Case:
    """One arm against another, at a look.

    Args:
        arm, other: their findings
        sweep: theirs
        evidence: of the arm
        look, comparison: of the evidence
        arms: number of arms that run each further seed
    """

    arm: Finding
    other: Finding
    sweep: Sweep
    evidence: Evidence
    look: Look
    comparison: Comparison
    arms: int

    @property
    def kind(self) -> Decision:
        if self.evidence.is_same:
            return "same"
        if not self.evidence.is_different:
            return "undecided"
        more_is_better = self.sweep.maximize or self.evidence.solved is not None
        return "better" if (self.difference > 0) == more_is_better else "worse"

    @property
    def difference(self) -> float:
        """Of the means, arm − other; of tasks that seeds solve or not, of the shares."""
        if (shares := self.evidence.solved) is not None:
            return shares.ours.value - shares.theirs.value
        return self.comparison.difference.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """At the level of the look."""
        low, high = self.comparison.difference.low, self.comparison.difference.high
        return None if low is None or high is None else (low, high)

    @property
    def sd(self) -> float:
        """σ of a paired difference; 0 if it is not known, or if there is no noise."""
        return self.evidence.spread.noise.sd if self.evidence.spread else 0.0

    @property
    def comparisons(self) -> int:
        """Number of simultaneous tests, its own included."""
        return max(1, self.evidence.comparisons)

    @property
    def unit(self) -> str:
        return f" {self.sweep.unit}".rstrip()

    def lost(self, side: Finding) -> list[Run]:
        """Runs of a side that the look lacks. A run that diverged has not solved its task, and is not lacking there."""
        looked = self.evidence.seeds[: self.look.seeds]
        gone = [run for run in side.lost if run.seed in looked]
        told = ("completed", "diverged") if self.evidence.solved is not None else ()
        return [run for run in gone if run.result.status not in told]


def sees(evidence: Evidence) -> float | None:
    """The smallest difference that four in five such sweeps show, with all planned seeds; None without noise."""
    spread, look = evidence.spread, evidence.look
    if spread is None or look is None or not spread.noise.sd:
        return None
    comparisons, most = max(1, evidence.comparisons), look.most
    return power.detectable(
        spread.noise.sd, most, spread.dof(most), comparisons, level=look.last_level, floor=spread.floor
    )


def states(lost: Sequence[Run]) -> str:
    """How runs were lost, and how many of each."""
    ends = [run.result.status if run.result.status != "completed" else "diverged" for run in lost]
    return " and ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))


# --- what an undecided arm needs: further seeds, and the minutes that they take ---------------------------------------


@dataclass(frozen=True)
class Need:
    """What it takes to see a difference.

    Args:
        difference: in the unit of the metric
        seeds: further ones, about
        minutes: for all arms; None if the time of a job is not known
    """

    difference: float
    seeds: int
    minutes: float | None


def need(case: Case) -> Need | None:
    """For the margin, or the difference that the sweep was planned to see, or else the one that was seen.

    A tiny one would need a thousand seeds, so that half of what these seeds can see is the least. So it is where they
    can see more than what is asked for: the truth lies between that and none.

    Returns:
        None without noise, or if 100,000 seeds are not enough, as where tuning leaves more than the difference
    """
    spread, design, n = case.evidence.spread, case.sweep.design, case.comparison.difference.n
    if spread is None or not case.sd:
        return None
    level, floor = case.look.last_level, spread.floor
    half = power.detectable(case.sd, n, spread.dof(n), case.comparisons, level=level, floor=floor) / 2
    difference = design.within or design.see or max(abs(case.difference), half)
    difference = difference if difference < 2 * half else half
    try:
        total = _total(difference, spread, case)
    except ValueError:
        return None
    total = min((look for look in design.looks if look >= total), default=total)
    further = max(total - n, 1)
    return Need(difference, further, _minutes(further, case))


def _total(difference: float, spread: Spread, case: Case) -> int:
    """Seeds that show a difference; and if there is a margin, that there is none as large.

    Raises:
        ValueError: more than 100,000
    """
    level, floor = case.look.last_level, spread.floor
    total = power.seeds_to_see(difference, case.sd, spread.dof, case.comparisons, level=level, floor=floor)
    if not case.sweep.design.within:
        return total
    enough = range(max(total, 2), power.MOST + 1)

    def shows(n: int) -> bool:
        return margin_seen(case.sd, n, dof=spread.dof(n), floor=floor) <= difference

    at = bisect_left(enough, True, key=shows)
    if at == len(enough):
        raise ValueError(f"a margin of {difference:g} at a noise of {case.sd:g} needs more than {power.MOST:,} seeds")
    return enough[at]


def _minutes(further: int, case: Case) -> float | None:
    design = case.sweep.design
    known = [s for run in (*case.arm.runs, *case.other.runs) if (s := run.result.fit_seconds) is not None]
    of_a_job = design.seconds_a_job or (median(known) if known else None)
    jobs = math.ceil(further * case.arms / (design.workers or 1))
    return None if of_a_job is None else jobs * of_a_job / 60
