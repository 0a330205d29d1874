"""What an ablation will run and see, in words, before it starts."""

from __future__ import annotations

import math

from blockwright.lab.ablation import seed_counts
from blockwright.lab.ablation.bank import Entry
from blockwright.lab.ablation.planning import Plan
from blockwright.lab.ablation.seed_counts import FEWEST, affordable, last_level
from blockwright.lab.statistics.tuning import TUNE
from blockwright.lab.sweep.table import duration


def jobs(plan: Plan) -> str:
    """How many jobs there are, at most, and how long they take."""
    scheme, arms = plan.scheme, len(plan.scheme.recipes)
    tries = sum(job.get("stage") == TUNE for job in plan.jobs)
    by = f" by {scheme.tuned_by.metric}" if scheme.tuned_by else ""
    tuning = f"{tries} jobs tune {' and '.join(scheme.tune or ())}{by}, and more where an arm needs it"
    parts = [tuning] if scheme.tune else []
    count = seeds(plan)
    rates = len(scheme.rates or (None,))
    if scheme.until:
        looks = ", ".join(map(str, scheme.looks or ()))
        parts.append(f"{arms} arms × up to {count} seeds, until each has a verdict, looked for at {looks}")
    elif count is None:
        first = f"{2 * scheme.pairs} of {scheme.baseline} to measure the noise, then" if scheme.pairs else "as many as"
        goal = f"the seeds that see {scheme.see:g}" if scheme.see else f"{scheme.hours:g} h allow"
        parts.append(f"{arms} arms × seeds: {first} {goal}")
    else:
        parts.append(f"{arms * rates * count} jobs compare {arms} arms × {count} seeds")
    text = "; then ".join(parts)
    each = scheme.seconds_a_job
    if each is None or count is None:
        return text
    total = (tries + arms * rates * count) * each / scheme.workers
    limit = min(total, (scheme.hours or math.inf) * 3600)
    return f"{text}; about {duration(limit)}"


def jobs_of(plan: Plan, arm: str) -> int:
    """Jobs of an arm at most: its tries, and its seeds at each rate; those that are listed where that is not known."""
    listed = [job for job in plan.jobs if job["arm"] == arm]
    tries, count = sum(job.get("stage") == TUNE for job in listed), seeds(plan)
    return len(listed) if count is None else tries + count * len(plan.scheme.rates or (None,))


def seeds(plan: Plan) -> int | None:
    """Seeds that are compared at most; of ``hours`` by the time of earlier jobs, None if that is not known."""
    scheme = plan.scheme
    if scheme.seeds_planned is not None or scheme.hours is None or not scheme.seconds_a_job:
        return scheme.seeds_planned
    tries = sum(job.get("stage") == TUNE for job in plan.jobs)
    left = scheme.hours * 3600 - tries * scheme.seconds_a_job / scheme.workers
    return max(FEWEST, affordable(left, scheme.seconds_a_job, len(scheme.recipes), scheme.workers))


def seen(plan: Plan) -> str:
    """The smallest difference that four in five such sweeps show."""
    scheme, noise, count = plan.scheme, plan.noise, seeds(plan)
    if scheme.solved is not None:
        return f"Shares of seeds whose {scheme.solved.metric} reaches {scheme.solved.at:g} are compared."
    if noise is None:
        measured = f"see=… pairs=3 measures it first, with 6 runs of {scheme.baseline}"
        return f"The noise of this shape, length and rate is not known, so neither is what this sweep sees: {measured}."
    tries = seed_counts.tries_of(scheme.tune, scheme.tune_seeds, scheme.tuned_by)
    precision = seed_counts.precision(len(scheme.compared), noise, scheme.bank, tries)
    source = f"σ {noise.sd:.2g} from {noise.origin}{_rate(noise, bool(scheme.tune))}"
    source += (
        f", and ± {math.sqrt(precision.left.variance):.2g} that tuning usually leaves" if precision and tries else ""
    )
    if precision is None or count is None or precision.dof(count) <= 0:
        return f"One seed sees nothing, whatever the noise ({source})." if count == 1 else f"Noise: {source}."
    level = last_level(scheme.looks, scheme.spend) if scheme.looks else 0.05
    return f"This sweep sees {precision.sees(count, level):.2g}{plan.unit} four times in five ({source})."


def _rate(noise: Entry, tuned: bool) -> str:
    """The rate at which noise was measured: pairs of runs have less in common at higher ones."""
    if noise.lr is None:
        return ""
    doubt = ", and more if these are tuned to higher ones" if tuned and not noise.tuned else ""
    return f", at a {'tuned ' if noise.tuned else ''}rate of {noise.lr:g}{doubt}"
