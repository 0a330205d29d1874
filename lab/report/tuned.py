"""How each arm was tuned: the tries of a setting, the fitted curve, and how far from the best the arm is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockwright.lab.report.sweep import Run
from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.tuning import ENDS, Fit, Try
from blockwright.lab.sweep.tuning import RATE, Aim


@dataclass(frozen=True)
class Tuned:
    """One setting of an arm, tuned.

    Args:
        path: of the setting
        tries: value → loss of its run, or the mean over seeds; ascending, infinite for a run that was lost
        used: value at which the arm is compared; None while it is not
        pending: number of tries that have not ended
    """

    path: str
    tries: tuple[Try, ...]
    used: float | None
    pending: int = 0

    @property
    def name(self) -> str:
        return "rate" if self.path == RATE else self.path

    @property
    def fit(self) -> Fit | None:
        """The curve through the best tries; None for fewer than three that have ended well."""
        return tuning.fit(self.tries) if sum(not each.diverged for each in self.tries) > 2 else None

    @property
    def edge(self) -> str:
        """``largest`` or ``smallest`` if the best value is the last one tried, so that a better one may lie beyond."""
        edge = tuning.fit(self.tries).edge if len(self.tries) > 1 else None
        return ENDS[edge] if edge else ""

    @property
    def excess(self) -> float | None:
        """Expected loss above that at the best value: from the noise of the tries, and of a value off the vertex."""
        fit = self.fit
        if fit is None or self.used is None or self.edge:
            return None
        return fit.regret + fit.curvature * math.log2(self.used / fit.vertex) ** 2


def from_tries(runs: Sequence[Run], used: Mapping[str, float], aim: Aim) -> tuple[Tuned, ...]:
    """The settings that the runs of the stage ``tune`` have tried, in that order.

    Args:
        runs: of that stage, of one arm
        used: path → value at which the arm is compared
        aim: figure by which they are judged
    """
    by_path: dict[str, list[Run]] = {}
    for run in runs:
        for path in list(run.tries)[-1:]:  # those before it were tuned before it
            by_path.setdefault(path, []).append(run)
    return tuple(
        Tuned(path, _tries(tried, path, aim), used.get(path), sum(run.is_pending for run in tried))
        for path, tried in by_path.items()
    )


def _tries(runs: Sequence[Run], path: str, aim: Aim) -> tuple[Try, ...]:
    ended = [(run.tries[path], aim.loss(run.result)) for run in runs if not run.is_pending]
    return tuple(tuning.averaged(ended))
