"""A sweep as a report sees it: its arms and their runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from blockwright.lab.statistics.looks import Spend
from blockwright.lab.statistics.tuning import COMPARE, Aim
from blockwright.registry import BlockError
from blockwright.registry.ranges import Count, NonNegative, Number, Positive, Seed
from blockwright.training.figure import Figure
from blockwright.training.result import UNFINISHED, Result

MOST_LOOKS, MOST_DOF = 50, 100_000
LONGEST_TITLE = 60  # letters of the values in a title


@dataclass(frozen=True)
class Run:
    """One job.

    Args:
        job: its number, which is its folder's name
        folder: of the run; None if it has not begun
        overrides: its own
        seed: 0 if no override sets it
        lr: its learning rate, if the plan sweeps it
        result: how it ended, and its figures
        curves: contents of ``curves.json``
        stage: of the plan: ``tune``, or ``compare``, whose runs alone are compared
        tries: tuned setting, by its path → the value of this run
    """

    job: int
    folder: Path | None
    overrides: tuple[str, ...]
    seed: int
    lr: float | None
    result: Result
    curves: Mapping[str, Any] = field(default_factory=dict)
    stage: str = COMPARE
    tries: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_pending(self) -> bool:
        """Whether it has not ended."""
        return self.result.status == UNFINISHED

    @property
    def figures(self) -> dict[str, float]:
        """params, active_params, flops (training, per token), cache_bytes (per token, fp32), as far as known."""
        known = {
            "params": self.result.parameters,
            "active_params": self.result.active_parameters,
            "flops": self.curves.get("flops_per_token"),
            "cache_bytes": self.curves.get("cache_bytes_per_token"),
        }
        return {name: value for name, value in known.items() if isinstance(value, int | float)}

    def loss_over_tokens(self, name: str = "val") -> list[tuple[float, float]]:
        """(tokens, loss) of its validations, or of ``train``."""
        tokens = self.curves.get("tokens_per_step")
        return [(step * tokens, loss) for step, loss in self.curves.get(name, [])] if tokens else []


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: of the arm
        overrides: that define it
        runs: its jobs of all stages: seeds, and learning rates where those are swept
        figures: from the plan; empty without one
        match: from the plan: how it was matched to the baseline
        against: from the plan: name of the arm that it is compared with; None for the baseline
    """

    name: str
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    match: Mapping[str, Any] | None = None
    against: str | None = None

    def of(self, stage: str) -> tuple[Run, ...]:
        """Its runs of one stage."""
        return tuple(run for run in self.runs if run.stage == stage)


@dataclass(frozen=True)
class Bank:
    """Noise of an earlier sweep of the same shape and data.

    Args:
        sd: σ of a paired difference
        dof: its degrees of freedom
        source: its name and date
        seeds: of its runs; empty where that is not known
    """

    sd: Positive
    dof: Annotated[float, Ge(1), Le(MOST_DOF)]
    source: str = ""
    seeds: tuple[Seed, ...] = ()

    def is_apart_from(self, seeds: Iterable[int]) -> bool:
        """Whether none of its runs has one of these seeds: that may be the same run, whatever its arm is called."""
        return bool(self.seeds) and {*self.seeds}.isdisjoint(seeds)


@dataclass(frozen=True)
class Solved:
    """What counts as solved: a figure at least ``at``, or at most where less is better."""

    metric: str
    at: Number


@dataclass(frozen=True)
class Design:
    """How a sweep was planned to decide. The defaults are those of a sweep that was not: each seed once, no margin.

    Args:
        within: δ in the unit of the metric: arms that differ by less are called the same
        see: difference that the sweep was planned to see
        looks: numbers of compared seeds at which it is looked, ascending; empty: once, at all seeds
        spend: how the looks share the probability of a false difference
        bank: noise of earlier sweeps
        solved: where the share of seeds that solved a task is compared, instead of the mean
        seconds_a_job: wall time of a job; None: as measured
        workers: jobs at a time
        rate: that the baseline was composed with; None if it is not known
    """

    within: Positive | None = None
    see: Positive | None = None
    looks: tuple[Count, ...] = ()
    spend: Spend = "obrien_fleming"
    bank: Bank | None = None
    solved: Solved | None = None
    seconds_a_job: NonNegative | None = None
    workers: Count = 1
    rate: Positive | None = None

    def __post_init__(self) -> None:
        if list(self.looks) != sorted(set(self.looks)) or len(self.looks) > MOST_LOOKS:
            rule = f"must rise, and be {MOST_LOOKS} or fewer"
            raise BlockError("looks", list(self.looks), rule, "Write looks: [4, 8, 12, 16]")


@dataclass(frozen=True)
class Sweep:
    """A sweep; ``arms[baseline]`` is the baseline, ``also`` are further figures to show, ``figures`` the units and
    directions that its runs give, by name, ``design`` how it was planned to decide, ``tuned_by`` what chose the tuned
    values, if not the metric."""

    directory: Path
    kind: str
    name: str
    command: str
    metric: str
    maximize: bool
    arms: tuple[Arm, ...]
    baseline: int
    also: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    design: Design = field(default_factory=Design)
    tuned_by: Aim | None = None

    @property
    def aim(self) -> Aim:
        """The figure by which tries were judged."""
        return self.tuned_by or Aim(self.metric, "maximize" if self.maximize else "minimize")

    @property
    def title(self) -> str:
        """Of an ablation its name; else the settings in which its arms differ: a sweep's name is its task's."""
        settings = [dict(o.lstrip("+").partition("=")[::2] for o in arm.overrides) for arm in self.arms]
        keys = dict.fromkeys(key for each in settings for key in each)
        different = [key for key in keys if len({each.get(key) for each in settings}) > 1]
        if self.kind == "ablation" or not different:
            return self.name
        names = ", ".join(key.replace("/", ".").rpartition(".")[2] for key in different)
        values = ", ".join(arm.name.rpartition("=")[2] for arm in self.arms)
        return f"{names}: {values}" if len(different) == 1 and len(values) <= LONGEST_TITLE else names

    @property
    def unit(self) -> str:
        """Of its metric, or nothing."""
        return self.unit_of(self.metric)

    def unit_of(self, name: str) -> str:
        return self.figures[name].unit if name in self.figures else ""

    @property
    def runs(self) -> list[Run]:
        return sorted((run for arm in self.arms for run in arm.runs), key=lambda run: run.job)
