"""What the seeds of a sweep say of each arm, at the looks that were planned: differences, their noise, corrected p.

A sweep that grows is looked at after 4, 8, 12 … seeds. The first look that decides an arm is its verdict. Seeds between
two looks are not judged, since each further look would call noise a difference more often. A sweep of
a fixed number of seeds has one look, at all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache

from blockwright.lab.report.sweep import Design
from blockwright.lab.statistics import intervals, looks, variance
from blockwright.lab.statistics.intervals import LEVEL, Comparison, Interval, Solved
from blockwright.lab.statistics.looks import Spend
from blockwright.lab.statistics.power import same_within
from blockwright.lab.statistics.tuning import Fit
from blockwright.lab.statistics.variance import Left, Noise


@dataclass(frozen=True)
class Look:
    """A look at the seeds that have ended.

    Args:
        seeds: how many
        most: seeds of the last look
        level: two-sided p below which a difference counts
        margin_level: of each one-sided test for equivalence
        last_level: that of the last look
    """

    seeds: int
    most: int
    level: float
    margin_level: float
    last_level: float

    @property
    def is_early(self) -> bool:
        return self.seeds < self.most


@dataclass(frozen=True)
class Side:
    """An arm's compared runs.

    Args:
        name: of the arm
        against: name of the arm that it is compared with; empty for the baseline
        seeds: in the plan's order
        values: seed → final figure, of those that have one
        pending: seeds that have not ended
        outcomes: seed → whether it solved the task; empty where that is not asked
        fits: of the settings that were tuned, at whose vertices its runs are
    """

    name: str
    against: str
    seeds: tuple[int, ...]
    values: Mapping[int, float]
    pending: Set[int]
    outcomes: Mapping[int, bool]
    fits: tuple[Fit, ...] = ()

    def left(self, sd_of_run: float) -> Left:
        """What its tuning leaves."""
        return sum((fit.left(sd_of_run) for fit in self.fits), Left())


@dataclass(frozen=True)
class Spread:
    """The noise of a paired difference, and how its degrees of freedom grow with the seeds.

    Args:
        noise: as estimated
        seeds: by which it is
        bank: degrees of freedom of earlier sweeps in it
    """

    noise: Noise
    seeds: int
    bank: float = 0.0

    def ahead(self, seeds: int) -> Noise:
        """As so many seeds will know it."""
        of_a_seed = (self.noise.dof - self.bank) / (self.seeds - 1)
        return replace(self.noise, dof=of_a_seed * (seeds - 1) + self.bank)

    @property
    def floor(self) -> float:
        """Standard error of a difference that seeds do not lessen."""
        return math.sqrt(self.noise.left.variance)

    def dof(self, seeds: int) -> float:
        """Degrees of freedom of the standard error of so many seeds."""
        return self.ahead(seeds).dof_of_error(seeds)


@dataclass(frozen=True)
class Evidence:
    """What the seeds say of one arm.

    Args:
        comparison: with the arm that it is compared with; None without a common seed
        seeds: that both arms have planned
        comparisons: number of simultaneous tests
        look: at which it was decided, else the last so far; None before the first
        spread: of the noise; None for one seed
        is_different, is_same: what the look decides; neither if it is undecided
        solved: shares of seeds that solved the task, where these are compared
    """

    comparison: Comparison | None
    seeds: tuple[int, ...]
    comparisons: int
    look: Look | None = None
    spread: Spread | None = None
    is_different: bool = False
    is_same: bool = False
    solved: Solved | None = None

    @property
    def is_decided(self) -> bool:
        return self.is_different or self.is_same


def weigh(sides: Sequence[Side], design: Design) -> dict[str, Evidence]:
    """The evidence on every arm that is compared.

    Args:
        sides: all arms; those without ``against`` are compared with none
        design: looks, margin and bank of the sweep
    """
    by_name = {side.name: side for side in sides}
    pairs = [Pair(side, by_name[side.against]) for side in sides if side.against]
    tested = sum(pair.is_testable for pair in pairs)
    known = {pair.arm.name: pair.so_far(tested) for pair in pairs}
    for at in range(len(design.looks) or 1):
        open_pairs = [pair for pair in pairs if not known[pair.arm.name].is_decided]
        reached = {pair.arm.name: (pair, look) for pair in open_pairs if pair.has(look := pair.look(design, at))}
        compared = {name: _compared(pair, look, sides, design, tested) for name, (pair, look) in reached.items()}
        for name, evidence in _corrected(pairs, known, compared).items():
            known[name] = _decided(evidence, design)
    return known


@dataclass(frozen=True)
class Pair:
    """An arm, and the one that it is compared with."""

    arm: Side
    other: Side

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(seed for seed in self.arm.seeds if seed in self.other.seeds)

    @property
    def is_testable(self) -> bool:
        """Whether a test of it is planned and still possible: two seeds that neither has lost."""
        alive = [s for s in self.seeds if all(s in side.values or s in side.pending for side in (self.arm, self.other))]
        return len(alive) > 1

    def look(self, design: Design, at: int) -> Look:
        most = len(self.seeds)
        return planned(design.looks, design.spend)[at] if design.looks else Look(most, most, *(1 - LEVEL,) * 3)

    def has(self, look: Look) -> bool:
        """Whether the seeds of a look have ended."""
        first = self.seeds[: look.seeds]
        return 0 < len(first) == look.seeds and not {*first} & (self.arm.pending | self.other.pending)

    def compare(self, seeds: Sequence[int], noise: Noise | None = None) -> Comparison | None:
        ours, theirs = ({s: side.values[s] for s in seeds if s in side.values} for side in (self.arm, self.other))
        return intervals.compare(ours, theirs, noise)

    def so_far(self, tested: int) -> Evidence:
        """Before the first look: no test."""
        found = self.compare(self.seeds)
        return Evidence(found and replace(found, p=None), self.seeds, tested)


@lru_cache
def planned(seeds: tuple[int, ...], spend: Spend) -> tuple[Look, ...]:
    """The looks of a growing sweep, with the levels that its spending function leaves to each."""
    differ = looks.nominal(seeds, spend)
    same = looks.nominal(seeds, spend, 2 * looks.LEVEL)
    return tuple(Look(n, seeds[-1], p, q / 2, differ[-1]) for n, p, q in zip(seeds, differ, same, strict=True))


def _compared(pair: Pair, look: Look, sides: Sequence[Side], design: Design, tested: int) -> Evidence:
    """A comparison at a look, not yet corrected."""
    seeds = pair.seeds[: look.seeds]
    if design.solved is not None:
        return _compared_shares(pair, look, seeds, tested)
    plain = pair.compare(seeds)
    spread = _spread(pair, plain, seeds, sides, design) if plain else None
    found = pair.compare(seeds, spread.noise) if spread else plain
    return Evidence(found and _at_level(found, look), pair.seeds, tested, look, spread)


def _at_level(comparison: Comparison, look: Look) -> Comparison:
    """With the interval at the level of the look: 95 % of a fixed number of seeds, wider at early looks."""
    found, noise = comparison.difference, comparison.noise
    if noise is None:
        return comparison
    half = noise.half(found.n, 1 - look.level)
    return replace(comparison, difference=Interval(found.mean, found.mean - half, found.mean + half, found.n))


def _compared_shares(pair: Pair, look: Look, seeds: Sequence[int], tested: int) -> Evidence:
    """Shares of seeds that solved the task, by an exact test; the figure itself has two peaks, and no t-test."""
    ours, theirs = ({s: side.outcomes[s] for s in seeds if s in side.outcomes} for side in (pair.arm, pair.other))
    shares, found = intervals.compare_shares(ours, theirs), pair.compare(seeds)
    if shares is None or found is None:
        return Evidence(found and replace(found, p=None), pair.seeds, tested, look)
    mean = Interval(found.difference.mean, None, None, found.difference.n)
    p = shares.p if min(shares.ours.n, shares.theirs.n) > 1 else None
    return Evidence(Comparison(mean, found.by_seed, p), pair.seeds, tested, look, solved=shares)


def _spread(
    pair: Pair, plain: Comparison, seeds: Sequence[int], sides: Sequence[Side], design: Design
) -> Spread | None:
    """The noise of a paired difference, with what the tuning of both arms leaves."""
    if plain.noise is None:
        return None
    spread = _of_seeds(pair, plain, plain.noise, seeds, sides, design)
    of_run = spread.noise.sd / math.sqrt(2)
    return replace(spread, noise=replace(spread.noise, left=pair.arm.left(of_run) + pair.other.left(of_run)))


def _of_seeds(
    pair: Pair, plain: Comparison, own: Noise, seeds: Sequence[int], sides: Sequence[Side], design: Design
) -> Spread:
    """The noise of seeds: with what the arms tell that have all of them, and the bank."""
    shared = [seed for seed in seeds if seed in plain.by_seed]
    table = {side.name: {s: side.values[s] for s in shared} for side in sides if side.values.keys() >= {*shared}}
    noise = variance.between(table, pair.arm.name, pair.other.name) or own
    bank = design.bank
    if bank is None or not noise.sd or not bank.is_apart_from(pair.seeds):
        return Spread(noise, len(shared))
    with_bank = variance.with_bank(noise, Noise(bank.sd, bank.dof, "bank"))
    return Spread(with_bank, len(shared), bank=with_bank.dof - noise.dof)


def _corrected(
    pairs: Sequence[Pair], known: Mapping[str, Evidence], compared: Mapping[str, Evidence]
) -> dict[str, Evidence]:
    """The comparisons of a look after Holm's correction over all that the sweep tests.

    An arm found different at an earlier look counts as the smallest p; one that has not come to this look, or was
    found the same, as the largest.
    """
    ps: list[float | None] = []
    for pair in pairs:
        now, before = compared.get(pair.arm.name), known[pair.arm.name]
        if now is not None:
            found = now.comparison
            untold = found is not None and found.p is None and found.difference.n > 1  # without noise: tested in vain
            ps.append(1.0 if untold else found.p if found else None)
        else:
            ps.append(0.0 if before.is_different else 1.0 if pair.is_testable else None)
    corrected = dict(zip((pair.arm.name for pair in pairs), intervals.holm(ps), strict=True))
    return {
        name: replace(each, comparison=each.comparison and replace(each.comparison, corrected=corrected[name]))
        for name, each in compared.items()
    }


def _decided(evidence: Evidence, design: Design) -> Evidence:
    """What a look decides: a difference first, then that there is none."""
    comparison, look = evidence.comparison, evidence.look
    if comparison is None or look is None or comparison.p is None or comparison.corrected is None:
        return evidence
    if comparison.corrected < look.level:
        return replace(evidence, is_different=True)
    return replace(evidence, is_same=_is_same(comparison, look, design))


def _is_same(comparison: Comparison, look: Look, design: Design) -> bool:
    if design.solved is not None or comparison.noise is None:
        return False
    if not any(comparison.by_seed.values()):  # the same function, to the last digit: seeds have other values
        return True
    mean, noise = comparison.difference, comparison.noise
    margin = design.within
    return margin is not None and same_within(
        mean.mean, noise.error(mean.n), noise.dof_of_error(mean.n), margin, look.margin_level
    )
