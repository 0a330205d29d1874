"""What the plan of an ablation says of the jobs to come, in its plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockwright.lab.report.sweep import Bank, Solved
from blockwright.lab.statistics.looks import Spend
from blockwright.lab.statistics.tuning import Aim
from blockwright.registry import BlockError
from blockwright.registry.ranges import Count, NonNegative, Number, Positive, Seed
from blockwright.registry.reading import keys
from blockwright.registry.reading import read as read_settings


@dataclass(frozen=True)
class Recipe:
    """What the jobs of an arm have in common.

    Args:
        overrides: without seed and tuned settings
        init_from: arm whose run of the same seed its weights start from
        values: path of a tuned setting → its composed value, around which it is tried
        compared: whether others are compared with it, or it with others
    """

    overrides: tuple[str, ...]
    init_from: str | None = None
    values: dict[str, Positive] = field(default_factory=dict)
    compared: bool = True


@dataclass(frozen=True)
class Scheme:
    """How an ablation grows.

    Args:
        recipes: arm → what its jobs have in common; empty in a plan that lists all of its jobs
        baseline: name of the arm that the others are compared with
        tune: path of a setting → number of tries to begin with
        tune_seeds: seeds of each try
        tuned_by: figure by which tries are judged; None: the compared one
        sd_of_run: noise of a run, with which an arm counts as tuned; 0 if it is not known
        rates: peak learning rates that each arm is compared at; None: one
        seeds: of the compared jobs; None if they follow from the results
        see, pairs, hours, until, looks, spend, within, solved: as in the definition
        bank: noise of earlier sweeps of the same shape and rate, for verdicts
        seeds_planned: at most so many are compared; None if that depends on time
        seconds_a_job: wall time, from the bank; None: as measured
        workers: jobs at a time
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    baseline: str = ""
    tune: dict[str, Count] | None = None
    tune_seeds: Count = 1
    tuned_by: Aim | None = None
    sd_of_run: NonNegative = 0.0
    rates: tuple[Positive, ...] | None = None
    seeds: tuple[Seed, ...] | None = None
    see: Positive | None = None
    pairs: Count | None = None
    hours: Positive | None = None
    until: str | None = None
    looks: tuple[Count, ...] | None = None
    spend: Spend = "obrien_fleming"
    within: Positive | None = None
    solved: Solved | None = None
    bank: Bank | None = None
    seeds_planned: Count | None = None
    seconds_a_job: Number | None = None
    workers: Count = 1

    def __post_init__(self) -> None:
        for name, recipe in self.recipes.items():
            if lacking := [path for path in self.tune or () if path not in recipe.values]:
                raise BlockError("recipes", name, f"lacks the value of {lacking[0]}", "Plan the ablation again")
        if self.recipes and self.baseline not in self.recipes:
            raise BlockError("baseline", self.baseline, "has no recipe", "Plan the ablation again")
        if self.until and not self.looks:
            raise BlockError("looks", self.looks, "are needed by until", "Plan the ablation again")

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Scheme:
        """Read a plan.

        Raises:
            ConfigError: a value that no plan can have
        """
        return read_settings(cls, {key: plan[key] for key in keys(cls) if key in plan})

    @property
    def compared(self) -> list[str]:
        return [name for name, recipe in self.recipes.items() if recipe.compared]
