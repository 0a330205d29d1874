"""How many seeds an ablation needs, what it sees with them, and how many each arm has next, by the results so far.

Power is planned before anything is run: an ablation has as many seeds and looks as its definition says, or as its noise
asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.ablation import bank
from blockwright.lab.ablation.bank import Entry, Shape
from blockwright.lab.ablation.definition import MAX_SEEDS, Definition
from blockwright.lab.ablation.scheme import Recipe, Scheme
from blockwright.lab.report import reading
from blockwright.lab.report.findings import find
from blockwright.lab.report.sweep import Bank
from blockwright.lab.report.verdict import verdicts
from blockwright.lab.statistics import looks, power
from blockwright.lab.statistics.looks import Spend
from blockwright.lab.statistics.tuning import RATE, Aim
from blockwright.lab.statistics.variance import Left, Noise, dof_of
from blockwright.registry import ConfigError
from blockwright.training.result import Result

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


def make(
    definition: Definition,
    recipes: Mapping[str, Recipe],
    tuned_by: Aim | None,
    shape: Shape,
    entries: Sequence[Entry],
) -> Scheme:
    """The scheme of an ablation.

    Args:
        definition: of the ablation
        recipes: of its arms
        tuned_by: figure that judges the tries, if it is not the metric
        shape: of the baseline
        entries: of the bank of noise

    Raises:
        ConfigError: ``see`` needs noise that is not known, or more seeds than an ablation may have
    """
    d = definition
    noise = noise_of(d, shape, entries)
    usable = noise_of(d, shape, [each for each in entries if _for_verdicts(d, each)])
    for_verdicts, seeds, looks = _for_verdicts(d, usable), d.seeds, d.looks
    if d.see is not None and d.pairs is None:
        arms = sum(recipe.compared for recipe in recipes.values())
        count = needed(d, d.see, precision(arms, noise, for_verdicts, tries_of(d.tune, d.tune_seeds, tuned_by)))
        seeds, looks = (None, quarters(count)) if d.until else (tuple(range(count)), None)
    return Scheme(
        dict(recipes),
        str(d.baseline),
        d.tune,
        d.tune_seeds or 1,
        tuned_by,
        _sd_of_run(d.metric, noise, entries) if tuned_by is None else _sd_of_run(tuned_by.metric, None, entries),
        d.lr,
        seeds,
        d.see,
        d.pairs,
        d.hours,
        d.until,
        looks,
        d.spend,
        d.within,
        d.solved,
        for_verdicts,
        seeds_planned=looks[-1] if looks else len(seeds) if seeds else None,
        seconds_a_job=bank.seconds_a_job(shape, entries, d.workers),
        workers=d.workers,
    )


def noise_of(definition: Definition, shape: Shape, entries: Sequence[Entry]) -> Entry | None:
    """The noise of earlier ablations of nearly this shape; None if there is none."""
    tries = (definition.tune or {}).get(RATE, 0)
    return bank.nearest(shape, entries, tries // 2)


def precision(arms: int, noise: Entry | None, for_verdicts: Bank | None, tries: int) -> Precision | None:
    """What the noise lets a sweep of so many compared arms see; None if it is not known.

    Args:
        arms: that are compared
        noise: of earlier sweeps
        for_verdicts: that which verdicts use
        tries: as of ``tries_of``
    """
    return None if noise is None else Precision(noise.sd, arms, for_verdicts.dof if for_verdicts else 0.0, tries)


def tries_of(tune: Mapping[str, int] | None, seeds: int | None, tuned_by: Aim | None) -> int:
    """Seeds of each try; 0 where tuning leaves nothing that is known: there is none, or another figure judged it."""
    return (seeds or 1) if tune and tuned_by is None else 0


def needed(definition: Definition, difference: float, precision: Precision | None) -> int:
    """Seeds that see a difference.

    Raises:
        ConfigError: the noise is not known, or they are too many
    """
    if precision is None:
        rule = (
            f"chooses the seeds by the noise of {definition.metric}, which is not known for this shape, length and rate"
        )
        raise ConfigError("see", difference, rule, "Write pairs=3 too, which measures it first, or seeds=8")
    try:
        count = precision.needed(difference)
    except ValueError:
        count = MAX_SEEDS + 1
    if count > MAX_SEEDS:
        rule = f"needs more than {MAX_SEEDS:,} seeds at a noise of {precision.sd:.2g}"
        remedy = f"{MAX_SEEDS:,} seeds see {precision.sees(MAX_SEEDS):.2g}"
        if precision.tries:
            remedy += f"; tune_seeds={2 * precision.tries} lessens what tuning leaves, which seeds do not"
        raise ConfigError("see", difference, rule, remedy)
    return count


def _for_verdicts(definition: Definition, noise: Entry | None) -> Bank | None:
    """The noise that verdicts may use beside their own, if they may.

    Of the same rate, so that of tuned arms if these are tuned; and of runs of other seeds than any that are planned.
    """
    seeds = definition.seeds or range(definition.looks[-1] if definition.looks else MAX_SEEDS)
    if noise is None or noise.tuned != bool(definition.tune) or not noise.bank.is_apart_from(seeds):
        return None
    return noise.bank


def _sd_of_run(metric: str, noise: Entry | None, entries: Sequence[Entry]) -> float:
    """Of the shape, else the smallest that is known: an arm is rather tuned once too often."""
    known = [noise.sd] if noise else [entry.sd for entry in entries if entry.metric == metric]
    return min(known, default=0.0) / math.sqrt(2)


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
    # As many seeds as the time allows; at least two, whose jobs show how long one takes
    return _all(scheme, max(FEWEST, _done(scheme, compared) + int(_affordable(scheme, results, 0))))


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
