"""What an undecided arm needs: further seeds, and the minutes that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from blockwright.lab.report.case import Case, sees
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

    A tiny one would need a thousand seeds, so that half of what the sweep sees is the least. Where enough seeds have
    ended already, the truth lies between the difference and none: then for half of it.

    Returns:
        None without noise or difference, or if 100,000 seeds are not enough
    """
    spread, design = case.evidence.spread, case.sweep.design
    difference = design.within or design.see or max(abs(case.difference), (sees(case.evidence) or 0) / 2)
    if spread is None or not case.sd or not difference:
        return None
    try:
        while (total := _total(difference, spread, case)) <= case.comparison.difference.n:
            difference /= 2
    except ValueError:
        return None
    total = min((look for look in design.looks if look >= total), default=total)
    further = total - case.comparison.difference.n
    return Need(difference, further, _minutes(further, case))


def _total(difference: float, spread: Spread, case: Case) -> int:
    """Seeds that show a difference; and if it is the margin, that there is none as large.

    Raises:
        ValueError: more than 100,000
    """
    sd, level, many = spread.noise.sd, case.look.last_level, max(1, case.evidence.comparisons)
    total = power.seeds_to_see(difference, sd, spread.dof, many, level=level)
    if case.sweep.design.within:
        while equivalence.margin_seen(sd, total, dof=spread.dof(total)) > difference:
            total += 1
    return total


def _minutes(further: int, case: Case) -> float | None:
    design = case.sweep.design
    known = [s for run in (*case.arm.runs, *case.other.runs) if (s := run.result.fit_seconds) is not None]
    of_a_job = design.seconds_a_job or (median(known) if known else None)
    jobs = math.ceil(further * case.arms / (design.workers or 1))
    return None if of_a_job is None else jobs * of_a_job / 60
