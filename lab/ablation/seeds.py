"""How many seeds an ablation needs, and what it sees with them: power, planned before anything is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blockwright.lab.statistics import looks, power
from blockwright.lab.statistics.looks import Spend
from blockwright.lab.statistics.variance import Left, Noise, dof_of

LEVEL = 0.05  # of a fixed number of seeds, two-sided
FEWEST = 2  # seeds of a comparison
LEFT = (
    0.03  # variance that tuning leaves in a difference / σ²: median of the tuned arms in benchmarks/results/ablations
)
LEFT_DOF = 6  # of the tries of two arms


@dataclass(frozen=True)
class Precision:
    """What the noise of a paired difference lets a sweep see.

    Args:
        sd: σ of a paired difference
        arms: that are compared, the baseline included
        bank: degrees of freedom of earlier sweeps, which add to the sweep's own
        tries: seeds of each try that tunes an arm; 0 if none is tuned
    """

    sd: float
    arms: int
    bank: float = 0.0
    tries: int = 0

    @property
    def left(self) -> Left:
        """What tuning usually leaves in a difference; of tries with more seeds less, in inverse proportion at least."""
        return Left(LEFT * self.sd**2 / self.tries, LEFT_DOF) if self.tries else Left()

    def dof(self, seeds: int) -> float:
        """Of the error of a mean: of the sweep's own variance and the bank's, and of what tuning leaves."""
        own = dof_of(self.arms, seeds) + self.bank
        return Noise(self.sd, own, "pooled", self.left).dof_of_error(seeds)

    def sees(self, seeds: int, level: float = LEVEL) -> float:
        """The difference that four in five such sweeps show, Holm's worst step."""
        floor = math.sqrt(self.left.variance)
        return power.detectable(self.sd, seeds, self.dof(seeds), self.arms - 1, level=level, floor=floor)

    def needed(self, difference: float) -> int:
        """Seeds that see a difference; at least two.

        Raises:
            ValueError: there is no such number below 100,000
        """
        floor = math.sqrt(self.left.variance)
        return max(FEWEST, power.seeds_to_see(difference, self.sd, self.dof, self.arms - 1, floor=floor))


def last_level(seeds: Sequence[int], spend: Spend) -> float:
    """Two-sided p that the last of several looks leaves; of a single look 5 %."""
    return looks.nominal(seeds, spend)[-1] if len(seeds) > 1 else LEVEL


def quarters(most: int) -> tuple[int, ...]:
    """Four looks, evenly spaced, the last at ``most`` seeds; fewer where a look had less than two."""
    return tuple(sorted({max(FEWEST, math.ceil(most * part / 4)) for part in (1, 2, 3, 4)}))


def affordable(seconds: float, seconds_a_job: float, arms: int, workers: int) -> int:
    """Seeds of all arms that fit into a time."""
    return max(0, math.floor(seconds * workers / (seconds_a_job * arms) + 1e-9)) if seconds_a_job > 0 else 0
