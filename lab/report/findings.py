"""Findings of a sweep: each arm at its best learning rate, against the baseline, with lost runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from blockwright.lab.report.sweep import Arm, Run, Sweep
from blockwright.lab.statistics import intervals, speed
from blockwright.lab.statistics.intervals import Comparison, Interval
from blockwright.training.result import UNFINISHED


@dataclass(frozen=True)
class Rate:
    """An arm at one learning rate: its values by seed, and its number of seeds."""

    lr: float | None
    values: Mapping[int, float]
    planned: int

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values.values()) / len(self.values) if self.values else None


@dataclass(frozen=True)
class Finding:
    """Findings of one arm.

    Args:
        arm: the arm
        is_baseline: whether the others are compared with it
        runs: those at its best learning rate, or all
        rates: by learning rate, ascending; a single one if not swept
        lr: the best one
        values: seed → final figure, lost seeds left out
        interval: of these; None if all are lost
        against: name of the arm that it is compared with
        comparison: with that arm; None for the baseline itself, or without a common seed
        speed_up: in tokens, over the common seeds; None without curves
        figures: params, active_params, flops, cache_bytes: of its runs, else of the plan
        also: further figures of the sweep that its runs have logged → their interval over seeds
    """

    arm: Arm
    is_baseline: bool
    against: str
    runs: tuple[Run, ...]
    rates: tuple[Rate, ...]
    lr: float | None
    values: Mapping[int, float]
    interval: Interval | None
    comparison: Comparison | None
    speed_up: Interval | None
    figures: Mapping[str, float]
    also: Mapping[str, Interval]

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def lost(self) -> list[Run]:
        """Runs at this learning rate without a final figure."""
        return [run for run in self.runs if run.seed not in self.values]

    @property
    def lr_is_at_the_edge(self) -> bool:
        """Whether the best learning rate is the smallest or largest tried, so that a better one may lie beyond."""
        return len(self.rates) > 1 and self.lr in (self.rates[0].lr, self.rates[-1].lr)


@dataclass(frozen=True)
class Findings:
    """The findings of all arms, in the plan's order, and the sweep they are of."""

    sweep: Sweep
    arms: tuple[Finding, ...]

    @property
    def baseline(self) -> Finding:
        return self.arms[self.sweep.baseline]

    @property
    def others(self) -> list[Finding]:
        return [finding for finding in self.arms if not finding.is_baseline]

    @property
    def lost(self) -> list[Run]:
        return [run for run in self.sweep.runs if run.result.value(self.sweep.metric) is None]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.lost if run.result.status == UNFINISHED]

    @property
    def comparisons(self) -> int:
        """Number of simultaneous tests, for their correction."""
        return sum(f.comparison is not None and f.comparison.p is not None for f in self.arms)

    def arm_of(self, run: Run) -> str:
        return next(f.name for f in self.arms if run in f.arm.runs)

    def why_lost(self, run: Run) -> str:
        return why_lost(run, self.sweep.metric)


def why_lost(run: Run, metric: str) -> str:
    """Why a run has no final figure, in one sentence."""
    if run.result.status != "completed":
        return f"{run.result.status}: {run.result.reason}" if run.result.reason else run.result.status
    found = run.result.metrics.get(metric)
    return f"logged no {metric}" if found is None else f"diverged: its {metric} is {found}"


def find(sweep: Sweep) -> Findings:
    """Evaluate a sweep."""
    tuned = [_tuned(arm, sweep) for arm in sweep.arms]
    names = [arm.name for arm in sweep.arms]
    others = [names.index(arm.against) if arm.against in names else sweep.baseline for arm in sweep.arms]
    found = [
        _finding(arm, rates, rate, sweep.arms[other], tuned[other][1], sweep, is_baseline=i == sweep.baseline)
        for i, (arm, (rates, rate), other) in enumerate(zip(sweep.arms, tuned, others, strict=True))
    ]
    if sweep.kind == "search":  # trials depend on earlier ones, so they are not independent
        return Findings(sweep, tuple(replace(f, comparison=None) for f in found))
    corrected = intervals.holm([f.comparison.p if f.comparison else None for f in found])
    return Findings(sweep, tuple(_corrected(f, p) for f, p in zip(found, corrected, strict=True)))


def _corrected(finding: Finding, p: float | None) -> Finding:
    return replace(finding, comparison=finding.comparison and replace(finding.comparison, corrected=p))


def _tuned(arm: Arm, sweep: Sweep) -> tuple[tuple[Rate, ...], Rate]:
    """All learning rates of an arm, and the best: of those that lost the fewest seeds, the one with the best mean."""
    rates = tuple(_rate(lr, runs, sweep.metric) for lr, runs in _by_rate(arm.runs).items()) or (Rate(None, {}, 0),)
    sign = -1 if sweep.maximize else 1
    best = min(rates, key=lambda r: (-len(r.values), math.inf if r.mean is None else sign * r.mean))
    return rates, best


def _rate(lr: float | None, runs: Sequence[Run], metric: str) -> Rate:
    values = {run.seed: value for run in runs if (value := run.result.value(metric)) is not None}
    return Rate(lr, values, len({run.seed for run in runs}))


def _by_rate(runs: Sequence[Run]) -> dict[float | None, list[Run]]:
    found: dict[float | None, list[Run]] = {}
    for run in sorted(runs, key=lambda run: -math.inf if run.lr is None else run.lr):
        found.setdefault(run.lr, []).append(run)
    return found


def _finding(
    arm: Arm, rates: tuple[Rate, ...], rate: Rate, other: Arm, baseline: Rate, sweep: Sweep, *, is_baseline: bool
) -> Finding:
    runs = tuple(run for run in arm.runs if run.lr == rate.lr)
    theirs = [run for run in other.runs if run.lr == baseline.lr]
    return Finding(
        arm,
        is_baseline,
        other.name,
        runs,
        rates,
        rate.lr,
        rate.values,
        intervals.interval(list(rate.values.values())) if rate.values else None,
        None if is_baseline else intervals.compare(rate.values, baseline.values),
        None if is_baseline else _speed_up(runs, theirs, sweep.metric),
        _figures(runs, arm),
        _also(runs, sweep.also),
    )


def _speed_up(runs: Sequence[Run], theirs: Sequence[Run], metric: str) -> Interval | None:
    done = {run.seed: run for run in theirs if run.result.value(metric) is not None}
    pairs = [(run, done[run.seed]) for run in runs if run.seed in done and run.result.value(metric) is not None]
    ratios = [speed.speed_up(a.loss_over_tokens(), b.loss_over_tokens()) for a, b in pairs]
    known = [ratio for ratio in ratios if ratio is not None]
    return intervals.ratio_interval(known) if known else None


def _figures(runs: Sequence[Run], arm: Arm) -> dict[str, float]:
    """Figures measured on the runs, completed by the plan's."""
    found = dict(arm.figures)
    for run in runs:
        found |= run.figures
    return {name: value for name, value in found.items() if value is not None}


def _also(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Interval]:
    """Further figures of the runs."""
    known = {name: [value for run in runs if (value := run.result.value(name)) is not None] for name in names}
    return {name: intervals.interval(values) for name, values in known.items() if values}


def pareto(points: Sequence[tuple[float, float]], maximize: bool = False) -> list[int]:
    """Indices of the Pareto-optimal points, by rising cost.

    Args:
        points: (cost, figure)
        maximize: whether more of the figure is better
    """
    sign = -1 if maximize else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or sign * points[i][1] < sign * points[front[-1]][1]:
            front.append(i)
    return front
