"""Findings of a sweep: each arm as tuned, against the baseline, with the evidence of its seeds and its lost runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockwright.lab.report.evidence import Evidence, Side, weigh
from blockwright.lab.report.sweep import Arm, Run, Sweep
from blockwright.lab.statistics import intervals, tuning
from blockwright.lab.statistics.intervals import Comparison, Interval
from blockwright.lab.statistics.tuning import COMPARE, ENDS, RATE, TUNE, Aim, Fit, Try, loss_of

# --- how each arm was tuned -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """One setting of an arm, tuned.

    Args:
        path: of the setting
        tries: value → loss of its run, or the mean over seeds; ascending, infinite for a run that was lost
        used: value at which the arm is compared; None while it is not
        pending: number of tries that have not ended
    """

    path: str
    tries: tuple[Try, ...]
    used: float | None
    pending: int = 0

    @property
    def name(self) -> str:
        return "rate" if self.path == RATE else self.path

    @property
    def fit(self) -> Fit | None:
        """The curve through the best tries; None for fewer than three that have ended well."""
        return tuning.fit(self.tries) if sum(not each.diverged for each in self.tries) > 2 else None

    @property
    def edge(self) -> str:
        """``largest`` or ``smallest`` if the best value is the last one tried, so that a better one may lie beyond."""
        edge = tuning.fit(self.tries).edge if len(self.tries) > 1 else None
        return ENDS[edge] if edge else ""

    @property
    def excess(self) -> float | None:
        """Expected loss above that at the best value: from the noise of the tries, and of a value off the vertex."""
        fit = self.fit
        if fit is None or self.used is None or self.edge:
            return None
        return fit.regret + fit.curvature * math.log2(self.used / fit.vertex) ** 2


def from_tries(runs: Sequence[Run], used: Mapping[str, float], aim: Aim) -> tuple[Tuned, ...]:
    """The settings that the runs of the stage ``tune`` have tried, in that order.

    Args:
        runs: of that stage, of one arm
        used: path → value at which the arm is compared
        aim: figure by which they are judged
    """
    by_path: dict[str, list[Run]] = {}
    for run in runs:
        for path in list(run.tries)[-1:]:  # those before it were tuned before it
            by_path.setdefault(path, []).append(run)
    return tuple(
        Tuned(path, _tries(tried, path, aim), used.get(path), sum(run.is_pending for run in tried))
        for path, tried in by_path.items()
    )


def _tries(runs: Sequence[Run], path: str, aim: Aim) -> tuple[Try, ...]:
    ended = [(run.tries[path], aim.loss(run.result)) for run in runs if not run.is_pending]
    return tuple(tuning.averaged(ended))


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
        against: name of the arm that it is compared with
        runs: those that are compared: of a listed rate, at the best one
        lr: the best of the listed rates, or the tuned one
        tuned: the settings that were tuned, listed rates included
        values: seed → final figure, lost seeds left out
        interval: of these; None if all are lost
        evidence: of its seeds against that arm; None for the baseline, and of a search
        speed_up: in tokens, over the common seeds; None without curves
        figures: params, active_params, flops, cache_bytes: of its runs, else of the plan
        also: further figures of the sweep that its runs have logged → their interval over seeds
    """

    arm: Arm
    is_baseline: bool
    against: str
    runs: tuple[Run, ...]
    lr: float | None
    tuned: tuple[Tuned, ...]
    values: Mapping[int, float]
    interval: Interval | None
    evidence: Evidence | None
    speed_up: Interval | None
    figures: Mapping[str, float]
    also: Mapping[str, Interval]

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def comparison(self) -> Comparison | None:
        """With the other arm; None for the baseline itself, or without a common seed."""
        return self.evidence.comparison if self.evidence else None

    @property
    def lost(self) -> list[Run]:
        """Compared runs without a final figure."""
        return [run for run in self.runs if run.seed not in self.values]

    @property
    def tries(self) -> int:
        """Number of values tried."""
        return sum(len(each.tries) for each in self.tuned)


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
        return [run for run in self.lost if run.is_pending]

    @property
    def comparisons(self) -> int:
        """Number of simultaneous tests, for their correction."""
        return max((f.evidence.comparisons for f in self.arms if f.evidence), default=0)

    def named(self, name: str) -> Finding:
        return next(f for f in self.arms if f.name == name)

    def arm_of(self, run: Run) -> str:
        return next(f.name for f in self.arms if run in f.arm.runs)

    def why_lost(self, run: Run) -> str:
        return why_lost(run, self.sweep.metric)


def why_lost(run: Run, metric: str) -> str:
    """Why a run has no final figure, in one sentence."""
    if run.result.status != "completed":
        return f"{run.result.status}: {run.result.reason}" if run.result.reason else run.result.status
    value = run.result.metrics.get(metric)
    return f"logged no {metric}" if value is None else f"diverged: its {metric} is {value}"


def find(sweep: Sweep) -> Findings:
    """Evaluate a sweep."""
    chosen = [_chosen(arm, sweep) for arm in sweep.arms]
    names = [arm.name for arm in sweep.arms]
    others = [names.index(arm.against) if arm.against in names else sweep.baseline for arm in sweep.arms]
    evidence: dict[str, Evidence] = {}
    if sweep.kind != "search":  # trials depend on earlier ones, so they are not independent
        sides = [
            _side(names[i], "" if i == sweep.baseline else names[others[i]], chosen[i], sweep)
            for i in range(len(names))
        ]
        evidence = weigh(sides, sweep.design)
    return Findings(
        sweep,
        tuple(
            _finding(arm, chosen[i], names[others[i]], chosen[others[i]], evidence.get(arm.name), sweep)
            for i, arm in enumerate(sweep.arms)
        ),
    )


@dataclass(frozen=True)
class _Chosen:
    """The runs of an arm that are compared, and the tuning that chose them."""

    runs: tuple[Run, ...]
    lr: float | None
    tuned: tuple[Tuned, ...]
    listed: bool = False

    @property
    def fits(self) -> tuple[Fit, ...]:
        """Of settings tuned by runs of their own: the best of a list is compared by the runs that chose it."""
        return () if self.listed else tuple(fit for each in self.tuned if (fit := each.fit) is not None)

    def values(self, metric: str) -> dict[int, float]:
        return {run.seed: value for run in self.runs if (value := run.result.value(metric)) is not None}


def _chosen(arm: Arm, sweep: Sweep) -> _Chosen:
    """Of listed rates: those that lost the fewest seeds, and of these the one with the best mean."""
    listed = {lr: (runs, _rate(lr, runs, sweep.metric)) for lr, runs in _by_rate(arm.of(COMPARE)).items()}
    if not listed:
        return _Chosen((), None, from_tries(arm.of(TUNE), {}, sweep.aim))
    best, _ = min(listed.values(), key=lambda each: _order(each[1], sweep.maximize))
    lr = best[0].lr
    if len(listed) == 1:
        tries = from_tries(arm.of(TUNE), best[0].tries, sweep.aim)
        return _Chosen(tuple(best), best[0].tries.get(RATE, lr), tries)
    pending = sum(run.is_pending for run in arm.of(COMPARE))
    by_list = _tuned_by_list([rate for _, rate in listed.values()], lr, pending, sweep.maximize)
    return _Chosen(tuple(best), lr, (by_list,), listed=True)


def _order(rate: Rate, maximize: bool) -> tuple[int, float]:
    return -len(rate.values), loss_of(rate.mean, maximize)


def _tuned_by_list(rates: Sequence[Rate], used: float | None, pending: int, maximize: bool) -> Tuned:
    """Rates that were listed: one that lost seeds which the best has not is worse than all others."""
    whole = max(len(rate.values) for rate in rates)
    losses = {r.lr: loss_of(r.mean if len(r.values) == whole else None, maximize) for r in rates}
    return Tuned(RATE, tuple(Try(lr, loss) for lr, loss in losses.items() if lr), used, pending)


def _side(name: str, against: str, chosen: _Chosen, sweep: Sweep) -> Side:
    seeds = tuple(dict.fromkeys(run.seed for run in chosen.runs))
    ended = {run.seed for run in chosen.runs if not run.is_pending}
    values, outcomes = chosen.values(sweep.metric), _outcomes(chosen.runs, sweep)
    fits = chosen.fits if sweep.aim.metric == sweep.metric else ()  # by another figure they say nothing of this one
    return Side(name, against, seeds, values, {*seeds} - ended, outcomes, fits)


def _outcomes(runs: Sequence[Run], sweep: Sweep) -> dict[int, bool]:
    """Seed → whether it solved the task; a run that diverged has not."""
    if (wanted := sweep.design.solved) is None:
        return {}
    figure = sweep.figures.get(wanted.metric)
    sign = -1 if figure is not None and figure.better == "less" else 1
    values = {
        run.seed: run.result.value(wanted.metric) for run in runs if run.result.status in ("completed", "diverged")
    }
    return {seed: value is not None and sign * value >= sign * wanted.at for seed, value in values.items()}


def _rate(lr: float | None, runs: Sequence[Run], metric: str) -> Rate:
    values = {run.seed: value for run in runs if (value := run.result.value(metric)) is not None}
    return Rate(lr, values, len({run.seed for run in runs}))


def _by_rate(runs: Sequence[Run]) -> dict[float | None, list[Run]]:
    found: dict[float | None, list[Run]] = {}
    for run in sorted(runs, key=lambda run: -math.inf if run.lr is None else run.lr):
        found.setdefault(run.lr, []).append(run)
    return found


def _finding(
    arm: Arm, chosen: _Chosen, against: str, other: _Chosen, evidence: Evidence | None, sweep: Sweep
) -> Finding:
    values, is_baseline = chosen.values(sweep.metric), arm is sweep.arms[sweep.baseline]
    # Figures measured on the runs, completed by the plan's
    found = dict(arm.figures)
    for run in chosen.runs:
        found |= run.figures
    figures = {name: value for name, value in found.items() if value is not None}
    # Further figures of the runs
    known = {
        name: [value for run in chosen.runs if (value := run.result.value(name)) is not None] for name in sweep.also
    }
    also = {name: intervals.interval(values) for name, values in known.items() if values}
    return Finding(
        arm,
        is_baseline,
        against,
        chosen.runs,
        chosen.lr,
        chosen.tuned,
        values,
        intervals.interval(list(values.values())) if values else None,
        evidence,
        None if is_baseline else _speed_up(chosen.runs, other.runs, sweep.metric),
        figures,
        also,
    )


def _speed_up(runs: Sequence[Run], theirs: Sequence[Run], metric: str) -> Interval | None:
    done = {run.seed: run for run in theirs if run.result.value(metric) is not None}
    pairs = [(run, done[run.seed]) for run in runs if run.seed in done and run.result.value(metric) is not None]
    ratios = [intervals.speed_up(a.loss_over_tokens(), b.loss_over_tokens()) for a, b in pairs]
    known = [ratio for ratio in ratios if ratio is not None]
    return intervals.ratio_interval(known) if known else None


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
