"""How many seeds each arm of an ablation has next, by the results so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockwright.lab.ablation.provision import tries_of
from blockwright.lab.ablation.scheme import Scheme
from blockwright.lab.ablation.seeds import FEWEST, Precision, affordable
from blockwright.lab.report import reading
from blockwright.lab.report.findings import find
from blockwright.lab.report.verdict import verdicts
from blockwright.training.result import Result

MOST = 1000
Jobs = Sequence[Mapping[str, Any]]
Seeds = dict[str, Sequence[int]]


def seeds(
    directory: Path, plan: Mapping[str, Any], scheme: Scheme, compared: Jobs, results: Mapping[int, Result]
) -> Seeds:
    """Arm → the seeds that it has next, those before included.

    Args:
        directory: of the ablation, for verdicts
        plan: contents of its plan.json
        scheme: of the plan
        compared: its jobs whose figures are compared
        results: number → result of each job
    """
    if scheme.seeds is not None:
        return dict.fromkeys(scheme.recipes, scheme.seeds)
    if scheme.until is not None:
        return _all(scheme, _next_look(directory, plan, scheme, _done(scheme, compared), results))
    if scheme.see is not None:
        return _seen(plan, scheme, compared, results)
    return _all(scheme, _in_time(scheme, _done(scheme, compared), results))


def _all(scheme: Scheme, count: int) -> Seeds:
    return dict.fromkeys(scheme.recipes, range(min(count, MOST)))


def _done(scheme: Scheme, compared: Jobs) -> int:
    """Seeds that every arm has."""
    return min(len({job.get("seed") for job in compared if job.get("arm") == arm}) for arm in scheme.recipes)


def _next_look(
    directory: Path, plan: Mapping[str, Any], scheme: Scheme, done: int, results: Mapping[int, Result]
) -> int:
    """Seeds of the next look; as many as before when every arm has a verdict, or the time is over."""
    looks = scheme.looks or ()
    if not done:
        return looks[0]
    following = next((look for look in looks if look > done), done)
    if following - done > _affordable(scheme, results, math.inf) or _is_settled(directory, plan, results):
        return done
    return following


def _is_settled(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> bool:
    """Whether no arm is undecided: more seeds do not help where there can be no verdict."""
    if all(result.value(plan["metric"]) is None for result in results.values()):
        return True
    return all(verdict.kind != "undecided" for verdict in verdicts(find(reading.read(directory))))


def _in_time(scheme: Scheme, done: int, results: Mapping[int, Result]) -> int:
    """As many seeds as the time allows; at least two, whose jobs show how long one takes."""
    return max(FEWEST, done + int(_affordable(scheme, results, 0)))


def _affordable(scheme: Scheme, results: Mapping[int, Result], unknown: float) -> float:
    """Further seeds of all arms that the time allows; ``unknown`` before a job has shown how long one takes."""
    if scheme.hours is None:
        return math.inf
    took = [seconds for result in results.values() if (seconds := result.wall_seconds or result.fit_seconds)]
    if not took:
        return unknown
    each = math.fsum(took) / len(took)
    left = scheme.hours * 3600 - math.fsum(took) / scheme.workers
    return affordable(left, each, len(scheme.recipes), scheme.workers)


def _seen(plan: Mapping[str, Any], scheme: Scheme, compared: Jobs, results: Mapping[int, Result]) -> Seeds:
    """First the pairs of the baseline, then as many seeds of all arms as their noise asks for."""
    first = 2 * (scheme.pairs or 0)
    if not compared:
        return {scheme.baseline: range(first)}
    if _done(scheme, compared):
        return {}
    jobs = [job for job in compared if job.get("arm") == scheme.baseline and job.get("seed") in range(first)]
    values = [value for job in jobs if (value := results[job["job"]].value(plan["metric"])) is not None]
    if len(values) < FEWEST or scheme.see is None:
        return _all(scheme, FEWEST)
    tries = tries_of(scheme.tune, scheme.tune_seeds, scheme.tuned_by)
    precision = Precision(unpaired(values), len(scheme.compared), tries=tries)
    return _all(scheme, precision.needed(scheme.see) if precision.sd else FEWEST)


def unpaired(values: Sequence[float]) -> float:
    """σ of the difference of two runs of one arm with different seeds: at least that of two arms with the same."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(2 * math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
