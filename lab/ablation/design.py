"""The design of an ablation: its jobs follow from those that have ended.

The stage ``tune`` tries values of each tuned setting, with one seed or a few, the same for all values of an arm: first
some in octaves around the composed value, then two further ones for every arm while one needs them. The stage
``compare`` runs fresh seeds at each arm's best value, since the seed that chose a value flatters it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blockwright.lab.ablation import seed_counts
from blockwright.lab.ablation.scheme import Scheme
from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.tuning import COMPARE, RATE, TUNE, Aim, Try, next_round, octaves
from blockwright.training.result import Result

Job = dict[str, Any]
TUNING_SEED = 10_000  # beyond those that are compared
ROUNDS = 3  # of further tries
DIGITS = 3  # of a chosen value


def more(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[Job]:
    """The jobs that follow when all jobs of a plan have ended; none at the end.

    Args:
        directory: of the ablation
        plan: contents of its plan.json
        results: number → result of each job
    """
    scheme = Scheme.of(plan)
    state = State(scheme, plan["jobs"], results, scheme.tuned_by or Aim(plan["metric"], plan["direction"]))
    if not state.scheme.recipes:
        return []
    tries = [] if state.of(COMPARE) else _tries(state)
    return tries or _compared(state, seed_counts.seeds(directory, plan, state.scheme, state.of(COMPARE), results))


def first(scheme: Scheme) -> list[Job]:
    """The jobs of an ablation that has none yet."""
    state = State(scheme, [], {}, Aim(""))
    return _tries(state) or _compared(state, seed_counts.seeds(Path(), {}, scheme, [], {}))


@dataclass(frozen=True)
class State:
    """A plan and its results so far."""

    scheme: Scheme
    jobs: Sequence[Mapping[str, Any]]
    results: Mapping[int, Result]
    aim: Aim

    def of(self, stage: str) -> list[Mapping[str, Any]]:
        return [job for job in self.jobs if job.get("stage", COMPARE) == stage]

    @cached_property
    def tuned(self) -> list[str]:
        """Paths of the settings that have tries, in their order."""
        return list(dict.fromkeys(_path(job) for job in self.of(TUNE) if job.get("tries")))

    def tries(self, arm: str, path: str) -> list[Try]:
        """What has been tried of a setting, once those before it were chosen."""
        jobs = [job for job in self.of(TUNE) if job.get("arm") == arm and _path(job) == path]
        return tuning.averaged((job["tries"][path], self.aim.loss(self.results[job["job"]])) for job in jobs)

    def chosen(self, arm: str, path: str) -> float:
        """The value that later jobs of an arm have, so that a retried try changes nothing; else the vertex."""
        for job in self.jobs:
            is_later = job.get("stage") == COMPARE or _path(job) != path
            if job.get("arm") == arm and is_later and path in job.get("tries", {}):
                return float(job["tries"][path])
        return rounded(tuning.fit(self.tries(arm, path)).vertex)


def _path(job: Mapping[str, Any]) -> str:
    """The setting that a job tries: the last, as those before it were chosen before."""
    return next(reversed(job.get("tries", {})), "")


def rounded(value: float) -> float:
    """To three digits: finer values say nothing."""
    return float(f"{value:.{DIGITS}g}")


def _tries(state: State) -> list[Job]:
    """The next tries of all arms; none when every setting is tuned."""
    tune, tuned = state.scheme.tune or {}, state.tuned
    if tuned and (further := _round(state, tuned[-1], tune.get(tuned[-1], 0))):
        return _tried(state, tuned[-1], further)
    path = next((path for path in tune if path not in tuned), None)
    if path is None:
        return []
    recipes = state.scheme.recipes.items()
    return _tried(state, path, {arm: octaves(recipe.values[path], tune[path]) for arm, recipe in recipes})


def _round(state: State, path: str, first: int) -> dict[str, list[float]]:
    tried = {arm: state.tries(arm, path) for arm in state.scheme.recipes}
    return next_round(tried, first, ROUNDS, state.scheme.sd_of_run)


def _tried(state: State, path: str, values: Mapping[str, Sequence[float]]) -> list[Job]:
    fixed = {arm: {p: state.chosen(arm, p) for p in state.tuned if p != path} for arm in values}
    wanted = [(arm, {**fixed[arm], path: rounded(value)}) for arm, each in values.items() for value in each]
    scheme, number = state.scheme, itertools.count(_next_number(state))
    seed = max([TUNING_SEED, *(s + 1 for s in scheme.seeds or ())])
    seeds = range(seed, seed + scheme.tune_seeds)
    return [_job(next(number), scheme, arm, s, tries) | {"stage": TUNE} for arm, tries in wanted for s in seeds]


def _compared(state: State, seeds: Mapping[str, Sequence[int]]) -> list[Job]:
    """The compared jobs that lack, an arm after another; ``after`` is the job whose weights one starts from."""
    jobs: list[Job] = []
    numbers = {(job.get("arm"), job.get("lr"), job.get("seed")): job["job"] for job in state.of(COMPARE)}
    scheme, first = state.scheme, _next_number(state)
    for arm, recipe in scheme.recipes.items():
        tries = {path: state.chosen(arm, path) for path in scheme.tune or ()}
        for lr in scheme.rates or (tries.get(RATE),):
            for seed in seeds.get(arm, ()):
                if (arm, lr, seed) in numbers:
                    continue
                job = _job(first + len(jobs), scheme, arm, seed, tries, lr)
                if recipe.init_from is not None:
                    job["after"] = numbers[recipe.init_from, lr, seed]
                numbers[arm, lr, seed] = job["job"]
                jobs.append(job)
    return jobs


def _job(number: int, scheme: Scheme, arm: str, seed: int, tries: Mapping[str, float], lr: float | None = None) -> Job:
    """A job; of several stages with its own, of tuned settings with their values."""
    lr = tries.get(RATE, lr)
    settings = tries if tries or lr is None else {RATE: lr}
    overrides = [*scheme.recipes[arm].overrides, f"seed={seed}", *(f"{p}={value!r}" for p, value in settings.items())]
    job: Job = {"job": number, "overrides": overrides, "arm": arm, "seed": seed, "lr": lr}
    return {**job, "stage": COMPARE, "tries": dict(tries)} if scheme.tune else job


def _next_number(state: State) -> int:
    return max((job["job"] for job in state.jobs), default=-1) + 1
