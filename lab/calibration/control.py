"""A control: a comparison whose outcome is known, read from conf/control; what was seen of it, and whether that passes.

A plug-in offers a package folder of controls through the entry-point group ``blockwright.controls``. A control is data.
Its overrides use Hydra's grammar, as in blockwright train. Its runs make a sweep as reports read it, so that the code
which gives an ablation's verdicts gives those of controls: pooled noise, Holm, looks, what tuning leaves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from blockwright.lab.ablation.definition import Overrides
from blockwright.lab.ablation.design import rounded
from blockwright.lab.definitions import Files
from blockwright.lab.report.findings import Finding, find
from blockwright.lab.report.sweep import Arm, Design, Run, Sweep
from blockwright.lab.report.verdict import Verdict, verdict
from blockwright.lab.statistics import tuning
from blockwright.lab.statistics.intervals import LEVEL
from blockwright.lab.statistics.tuning import COMPARE, RATE, TUNE
from blockwright.registry import BlockError
from blockwright.registry.ranges import Count, NonNegative, Positive, Seed
from blockwright.registry.reading import Remedy, keys
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.conf import CONF
from blockwright.training.result import UNFINISHED, Result

ENTRY_POINTS = "blockwright.controls"
METRIC = "val/loss"
BASELINE = "baseline"
TRY, APART, AGAIN = 500, 1_000, 100_000  # seeds further: of tries, of each arm with seeds of its own, of each repeat
Expect = Literal["worse", "better", "absent", "identical"]
Seeds = Annotated[tuple[Seed, ...], Remedy("Write seeds: [0, 1, 2, 3]")]


@dataclass(frozen=True)
class Control:
    """A baseline and arms, and how their losses are known to differ from its.

    Args:
        name: of the file
        about: the known effect, in one line
        expect: ``worse`` or ``better``: every arm differs in this direction; ``absent``: all are draws of one
            distribution; ``identical``: all compute the same, bit for bit
        arms: name → overrides, after ``base``
        base: overrides common to all
        baseline: overrides of the baseline, after ``base``
        least: nats by which ``worse`` and ``better`` must differ; about half of what was measured, so that a machine
            that rounds otherwise passes, and an effect that is nearly gone does not
        seeds: a run of each arm per seed
        apart: whether each arm has seeds of its own, so that equal arms differ by noise alone
        looks: numbers of seeds at which it is judged; empty: once, at all of them
        rates: learning rates at which each arm is tried before it is compared at its own best; empty: as composed
        repeats: how often it is run, each time with other seeds
    """

    name: str
    about: str
    expect: Expect
    arms: dict[str, Overrides]
    base: Overrides = ()
    baseline: Overrides = ()
    least: NonNegative = 0.0
    seeds: Seeds = (0, 1, 2, 3, 4, 5)
    apart: bool = False
    looks: tuple[Count, ...] = ()
    rates: tuple[Positive, ...] = ()
    repeats: Count = 1

    def __post_init__(self) -> None:
        if not self.arms or BASELINE in self.arms:
            rule = f"must name one arm or more, none of them {BASELINE}, with which they are compared"
            raise BlockError("arms", list(self.arms), rule, "Write arms: {mine: [model/position=none]}")
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            rule = "must list at least 2 different seeds: an interval takes two"
            raise BlockError("seeds", list(self.seeds), rule, "Write seeds: [0, 1, 2, 3]")
        if self.looks and self.looks[-1] != len(self.seeds):
            rule = f"must end with all {len(self.seeds)} seeds"
            raise BlockError("looks", list(self.looks), rule, f"Write looks: [2, {len(self.seeds)}]")
        if self.rates and len(set(self.rates)) < tuning.BEST:
            rule = f"must list at least {tuning.BEST} rates, which place the best one"
            raise BlockError("rates", list(self.rates), rule, "Write rates an octave apart, or leave them out")
        if self.least and not self.is_effect:
            raise BlockError("least", self.least, f"is of an effect, and {self.expect} expects none", "Leave it out")
        self.design  # noqa: B018 # refuses looks that do not rise

    @property
    def is_effect(self) -> bool:
        """Whether it expects a difference."""
        return self.expect in ("worse", "better")

    @property
    def design(self) -> Design:
        return Design(looks=self.looks)

    @property
    def covers(self) -> tuple[str, ...]:
        """What of the way to a verdict it goes through, besides a paired test."""
        parts = {"Holm's correction": len(self.arms) > 1, "looks": bool(self.looks), "tuning": bool(self.rates)}
        return tuple(part for part, used in parts.items() if used)

    def sweeps(self, losses: Mapping[Overrides, float]) -> list[Sweep]:
        """Its repeats, as reports read a sweep; a run without a loss has not ended.

        Args:
            losses: overrides of a run → its loss, infinite if it diverged. Compared runs of an arm that is tuned are
                planned once its tries have ended
        """
        return [self._sweep(losses, AGAIN * i) for i in range(self.repeats)]

    def missing(self, losses: Mapping[Overrides, float]) -> list[Overrides]:
        """The runs that can start now, each once."""
        runs = [run for sweep in self.sweeps(losses) for run in sweep.runs if run.is_pending]
        return list(dict.fromkeys(run.overrides for run in runs))

    def _sweep(self, losses: Mapping[Overrides, float], first: int) -> Sweep:
        jobs = itertools.count()
        arms = []
        for place, (name, own) in enumerate({BASELINE: self.baseline, **self.arms}.items()):
            shift = first + APART * place * self.apart
            runs = list(self._runs((*self.base, *own), shift, losses, jobs))
            arms.append(Arm(name, own, tuple(runs)))
        return Sweep(Path(self.name), "ablation", self.name, "", METRIC, False, tuple(arms), 0, design=self.design)

    def _runs(
        self, common: Overrides, shift: int, losses: Mapping[Overrides, float], jobs: Iterator[int]
    ) -> Iterator[Run]:
        """Of one arm: its tries, and once these have ended what is compared. Runs are paired by ``Run.seed``."""
        lr, tries = None, {}
        for rate in self.rates:
            overrides = (*common, f"{RATE}={rate:g}", f"seed={shift + TRY}")
            tries[rate] = losses.get(overrides)
            yield Run(next(jobs), None, overrides, TRY, rate, _result(tries[rate]), stage=TUNE, tries={RATE: rate})
        known = [(rate, loss) for rate, loss in tries.items() if loss is not None]
        if len(known) < len(self.rates):
            return
        if known:
            lr = rounded(tuning.fit(tuning.averaged(known)).vertex)
            common = (*common, f"{RATE}={lr:g}")
        for seed in self.seeds:
            overrides = (*common, f"seed={seed + shift}")
            used = {} if lr is None else {RATE: lr}
            yield Run(next(jobs), None, overrides, seed, lr, _result(losses.get(overrides)), stage=COMPARE, tries=used)


def _result(loss: float | None) -> Result:
    if loss is None:
        return Result(UNFINISHED)
    return Result("completed", metrics={METRIC: loss}) if math.isfinite(loss) else Result("diverged")


FILES = Files("control", CONF / "control", ENTRY_POINTS, tuple(key for key in keys(Control) if key != "name"), "--only")


def read(name: str) -> Control:
    """Read a control by its name.

    Raises:
        ConfigError: there is none, two have the name, or it is invalid
    """
    return read_settings(Control, {**FILES.read(name), "name": name}, f"control.{name}")


CHANCE = 0.05  # with which a sound instrument may see more absent effects than it is allowed
NOT_COVERED = "the matching of arms, noise of earlier sweeps and the runner of sweeps"


@dataclass(frozen=True)
class Outcome:
    """What was seen of a control.

    Args:
        name, about, expect, least, covers: of the control
        seeds: of each arm, in each repeat
        repeats: comparisons; of several arms all at once are one
        wrong: comparisons whose verdict is not what is known
        mean: difference of the losses, arm − baseline, in nats, of the verdict that is furthest from what is known;
            None if a run diverged
        low, high: its interval; None without one
        p: after Holm's correction; None without a test
        seen: ``worse``, ``better``, ``same``, ``undecided``, ``identical``; ``none`` if no verdict was given
    """

    name: str
    about: str
    expect: str
    least: float
    covers: tuple[str, ...]
    seeds: int
    repeats: int
    wrong: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    seen: str

    @property
    def is_effect(self) -> bool:
        return self.expect in ("worse", "better")

    @property
    def is_absent(self) -> bool:
        return self.expect == "absent"


def judge(control: Control, losses: Mapping[Overrides, float]) -> Outcome | None:
    """What the losses of a control's runs say; None if some are missing.

    Args:
        control: the comparison
        losses: overrides of a run → its loss
    """
    sweeps = control.sweeps(losses)
    if any(run.is_pending for sweep in sweeps for run in sweep.runs):
        return None
    wrong, every = 0, []
    for findings in map(find, sweeps):
        said = [(arm, verdict(arm, findings)) for arm in findings.others]
        wrong += not all(_is_known(arm, each, control) for arm, each in said)
        every += said
    sign = -1 if control.is_effect else 1  # of an effect the least certain verdict, else the most certain one
    arm, worst = min(every, key=lambda pair: (_is_known(pair[0], pair[1], control), sign * _p(pair[1])))
    low, high = worst.interval or (None, None)
    return Outcome(
        control.name,
        control.about,
        control.expect,
        control.least,
        control.covers,
        len(control.seeds),
        control.repeats,
        wrong,
        worst.difference,
        low,
        high,
        worst.p,
        _seen(arm, worst),
    )


def _p(of: Verdict) -> float:
    return 1.0 if of.p is None else of.p


def _seen(arm: Finding, of: Verdict) -> str:
    if of.kind == "same" and arm.comparison is not None and not any(arm.comparison.by_seed.values()):
        return "identical"
    return of.kind


def _is_known(arm: Finding, of: Verdict, control: Control) -> bool:
    """Whether a verdict is what is known: of an effect its direction and its size."""
    if control.is_effect:
        return of.kind == control.expect and of.difference is not None and abs(of.difference) >= control.least
    return _seen(arm, of) in (("identical",) if control.expect == "identical" else ("identical", "same", "undecided"))


@dataclass(frozen=True)
class Summary:
    """Which effects were seen, and which controls failed.

    Args:
        outcomes: of all controls that were run
    """

    outcomes: Sequence[Outcome]

    @property
    def missed(self) -> list[Outcome]:
        """Known effects that were not found."""
        return [each for each in self.outcomes if each.is_effect and each.wrong]

    @property
    def false(self) -> list[Outcome]:
        """Absent effects that were seen."""
        return [each for each in self.outcomes if each.is_absent and each.wrong]

    @property
    def unlike(self) -> list[Outcome]:
        """What computes the same, and differs. It has no noise, so that no difference of it is chance."""
        return [each for each in self.outcomes if each.expect == "identical" and each.wrong]

    @property
    def absent(self) -> int:
        """Comparisons of equal arms."""
        return sum(each.repeats for each in self.outcomes if each.is_absent)

    @property
    def allowed(self) -> int:
        """Absent effects that may be seen: more are seen by a sound instrument once in twenty calibrations."""
        from scipy.stats import binom

        return int(binom.ppf(1 - CHANCE, self.absent, 1 - LEVEL)) if self.absent else 0

    @property
    def passes(self) -> bool:
        """Whether every effect was found, few absent ones were seen, and what computes the same is the same."""
        few = sum(each.wrong for each in self.false) <= self.allowed
        return bool(self.outcomes) and not self.missed and few and not self.unlike

    @property
    def counts(self) -> str:
        """``9 of 9 known effects found, the smallest of 0.0098 nats; 0 of 15 absent ones seen, of which 2 may be``"""
        effects = [each for each in self.outcomes if each.is_effect]
        found = [abs(each.mean) for each in effects if not each.wrong and each.mean is not None]
        text = f"{len(effects) - len(self.missed)} of {len(effects)} known effects found"
        if found:
            text += f", the smallest of {min(found):.2g} nats"
        seen = sum(each.wrong for each in self.false)
        return f"{text}; {seen} of {self.absent} absent ones seen, of which {self.allowed} may be"

    @property
    def sentence(self) -> str:
        """Of a report."""
        if not self.passes:
            wrong = ", ".join(each.name for each in (*self.missed, *self.false, *self.unlike))
            return f"Not calibrated on this machine: {self.counts} (wrong: {wrong})."
        parts = dict.fromkeys(part for each in self.outcomes for part in each.covers)
        covered = " and ".join(
            filter(None, (", ".join(("training", "paired tests", *list(parts)[:-1])), *list(parts)[-1:]))
        )
        return f"Calibrated on this machine: {self.counts}. It covers {covered}, not {NOT_COVERED}."
