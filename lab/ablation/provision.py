"""Give an ablation its seeds and looks: as many as its definition says, or as its noise asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.ablation import bank
from blockwright.lab.ablation.bank import Entry, Shape
from blockwright.lab.ablation.definition import MAX_SEEDS, Definition
from blockwright.lab.ablation.scheme import Recipe, Scheme
from blockwright.lab.ablation.seeds import Precision, quarters
from blockwright.lab.report.sweep import Bank
from blockwright.lab.sweep.tuning import RATE, Aim
from blockwright.registry import ConfigError


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
