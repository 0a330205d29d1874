"""An arm with the look at its seeds that decides it, or has not yet: the figures of its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blockwright.lab.report.evidence import Evidence, Look
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.sweep import Run, Sweep
from blockwright.lab.statistics import power
from blockwright.lab.statistics.intervals import Comparison

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
