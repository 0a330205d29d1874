"""What an undecided arm needs: further seeds, and the minutes that they take."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from statistics import median

from blockwright.lab.report.case import Case
from blockwright.lab.report.evidence import Spread
from blockwright.lab.statistics import equivalence, power


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
        return equivalence.margin_seen(case.sd, n, dof=spread.dof(n), floor=floor) <= difference

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
