"""The jobs of a transfer: the rate is tuned at two widths, then compared on fresh seeds at the larger one.

Three arms are tuned: the small model, the large one under rules of width, and the large one in standard
parametrisation. Then the large model is trained with the best rate of the small one, and with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.statistics.tuning import Fit, Try, fit
from blockwright.lab.sweep.tuning import COMPARE, RATE, SD_OF_RUN, TUNE, loss_of, next_round
from blockwright.registry import ConfigError
from blockwright.registry.ranges import Count
from blockwright.registry.reading import keys
from blockwright.registry.reading import read as read_settings
from blockwright.training.result import Result

BASE, RULES, STANDARD = "base", "rules", "standard"  # arms that are tuned
TRANSFERRED = "transferred"  # the arm under rules at the rate of the base
ROUNDS = 3  # of two further tries for each arm, at most


@dataclass(frozen=True)
class Outline:
    """What a plan.json of a transfer has beside its arms and jobs.

    Args:
        widths: d_model of the smaller and of the larger model
        tune: number of the first rates
        seeds_planned: fresh seeds of the comparison
    """

    widths: tuple[Count, Count]
    tune: dict[str, Count]
    seeds_planned: Count


def more(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[dict[str, Any]]:
    """Further tries while an arm needs them, then the comparison; see ``lab.sweep.designs.Design``."""
    check(plan)
    if any(job["stage"] == COMPARE for job in plan["jobs"]):
        return []
    tried = tries(plan, results)
    seed = plan["jobs"][0]["seed"]
    further = next_round(tried, plan["tune"][RATE], ROUNDS, SD_OF_RUN)
    jobs = [job(plan, arm, arm, TUNE, seed, rate) for arm, each in further.items() for rate in each]
    if not jobs:
        rates = {arm: fit(each).vertex for arm, each in tried.items()}
        arms = {TRANSFERRED: (RULES, rates[BASE]), RULES: (RULES, rates[RULES]), STANDARD: (STANDARD, rates[STANDARD])}
        fresh = range(seed + 1, seed + 1 + plan["seeds_planned"])
        jobs = [job(plan, name, of, COMPARE, each, rate) for name, (of, rate) in arms.items() for each in fresh]
    first = len(plan["jobs"])
    return [{"job": first + i, **each} for i, each in enumerate(jobs)]


def check(plan: Mapping[str, Any]) -> None:
    """Refuse a plan that ``blockwright transfer`` cannot have made.

    Raises:
        ConfigError: it is damaged
    """
    outline = read_settings(Outline, {key: plan[key] for key in keys(Outline) if key in plan}, "plan.json")
    tried = {job.get("arm") for job in plan["jobs"] if job.get("stage") == TUNE}
    named = {arm["name"] for arm in plan.get("arms", [])}
    if RATE not in outline.tune or not {BASE, RULES, STANDARD} <= tried & named:
        raise _damaged("lacks an arm of the transfer, or its tries")
    for each in plan["jobs"]:
        of = {TUNE: (BASE, RULES, STANDARD), COMPARE: (TRANSFERRED, RULES, STANDARD)}.get(each.get("stage"), ())
        if each.get("arm") not in of or each.get("seed") is None or not each.get("tries", {}).get(RATE, 0) > 0:
            raise _damaged(f"job {each['job']} is of no arm, seed and rate of the transfer")


def _damaged(rule: str) -> ConfigError:
    return ConfigError("plan.json", "…", rule, "Correct it, or start a new transfer in another folder")


def job(plan: Mapping[str, Any], name: str, of: str, stage: str, seed: int, rate: float) -> dict[str, Any]:
    """One training.

    Args:
        plan: whose ``arms`` have the overrides
        name: arm of the job
        of: arm whose overrides it has
        stage: ``tune`` or ``compare``
        seed: of the run
        rate: peak learning rate
    """
    overrides = next(arm["overrides"] for arm in plan["arms"] if arm["name"] == of)
    settings = [*overrides, f"seed={seed}", f"{RATE}={rate!r}"]
    return {"overrides": settings, "arm": name, "seed": seed, "stage": stage, "tries": {RATE: rate}}


def tries(plan: Mapping[str, Any], results: Mapping[int, Result]) -> dict[str, list[Try]]:
    """Arm → the rates that were tried, with their losses; a run without one counts as diverged."""
    found: dict[str, list[Try]] = {}
    for each in plan["jobs"]:
        if each["stage"] == TUNE:
            loss = loss_of(results[each["job"]].value(plan["metric"]), plan["direction"] == "maximize")
            found.setdefault(each["arm"], []).append(Try(each["tries"][RATE], loss))
    return found


def fits(plan: Mapping[str, Any], results: Mapping[int, Result]) -> dict[str, Fit]:
    """Arm → its best rate."""
    return {arm: fit(each) for arm, each in tries(plan, results).items()}
