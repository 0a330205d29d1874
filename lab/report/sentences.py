"""Verdicts in words, and the case that each is about: one arm against another."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from blockwright.lab.report.evidence import Evidence, Look, Spread
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.sweep import Run, Sweep
from blockwright.lab.report.words import decimals, plain, probability, seeds, signed
from blockwright.lab.statistics import power
from blockwright.lab.statistics.intervals import Comparison
from blockwright.lab.statistics.looks import Spend, overestimate
from blockwright.lab.statistics.power import margin_seen
from blockwright.lab.statistics.tuning import RATE, TUNE

Decision = Literal["better", "worse", "same", "undecided"]


@dataclass(frozen=True)
class Case:
    """One arm against another, at a look.

    Args:
        arm, other: their findings
        sweep: theirs
        evidence: of the arm
        look, comparison: of the evidence
        arms: number of arms that run each further seed
    """

    arm: Finding
    other: Finding
    sweep: Sweep
    evidence: Evidence
    look: Look
    comparison: Comparison
    arms: int

    @property
    def kind(self) -> Decision:
        if self.evidence.is_same:
            return "same"
        if not self.evidence.is_different:
            return "undecided"
        more_is_better = self.sweep.maximize or self.evidence.solved is not None
        return "better" if (self.difference > 0) == more_is_better else "worse"

    @property
    def difference(self) -> float:
        """Of the means, arm − other; of tasks that seeds solve or not, of the shares."""
        if (shares := self.evidence.solved) is not None:
            return shares.ours.value - shares.theirs.value
        return self.comparison.difference.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """At the level of the look."""
        low, high = self.comparison.difference.low, self.comparison.difference.high
        return None if low is None or high is None else (low, high)

    @property
    def sd(self) -> float:
        """σ of a paired difference; 0 if it is not known, or if there is no noise."""
        return self.evidence.spread.noise.sd if self.evidence.spread else 0.0

    @property
    def comparisons(self) -> int:
        """Number of simultaneous tests, its own included."""
        return max(1, self.evidence.comparisons)

    @property
    def unit(self) -> str:
        return f" {self.sweep.unit}".rstrip()

    def lost(self, side: Finding) -> list[Run]:
        """Runs of a side that the look lacks. A run that diverged has not solved its task, and is not lacking there."""
        looked = self.evidence.seeds[: self.look.seeds]
        gone = [run for run in side.lost if run.seed in looked]
        told = ("completed", "diverged") if self.evidence.solved is not None else ()
        return [run for run in gone if run.result.status not in told]


def sees(evidence: Evidence) -> float | None:
    """The smallest difference that four in five such sweeps show, with all planned seeds; None without noise."""
    spread, look = evidence.spread, evidence.look
    if spread is None or look is None or not spread.noise.sd:
        return None
    comparisons, most = max(1, evidence.comparisons), look.most
    return power.detectable(
        spread.noise.sd, most, spread.dof(most), comparisons, level=look.last_level, floor=spread.floor
    )


def states(lost: Sequence[Run]) -> str:
    """How runs were lost, and how many of each."""
    ends = [run.result.status if run.result.status != "completed" else "diverged" for run in lost]
    return " and ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))


# --- what an undecided arm needs: further seeds, and the minutes that they take ---------------------------------------


@dataclass(frozen=True)
class Need:
    """What it takes to see a difference.

    Args:
        difference: in the unit of the metric
        seeds: further ones, about
        minutes: for all arms; None if the time of a job is not known
    """

    difference: float
    seeds: int
    minutes: float | None


def need(case: Case) -> Need | None:
    """For the margin, or the difference that the sweep was planned to see, or else the one that was seen.

    A tiny one would need a thousand seeds, so that half of what these seeds can see is the least. So it is where they
    can see more than what is asked for: the truth lies between that and none.

    Returns:
        None without noise, or if 100,000 seeds are not enough, as where tuning leaves more than the difference
    """
    spread, design, n = case.evidence.spread, case.sweep.design, case.comparison.difference.n
    if spread is None or not case.sd:
        return None
    level, floor = case.look.last_level, spread.floor
    half = power.detectable(case.sd, n, spread.dof(n), case.comparisons, level=level, floor=floor) / 2
    difference = design.within or design.see or max(abs(case.difference), half)
    difference = difference if difference < 2 * half else half
    try:
        total = _total(difference, spread, case)
    except ValueError:
        return None
    total = min((look for look in design.looks if look >= total), default=total)
    further = max(total - n, 1)
    return Need(difference, further, _minutes(further, case))


def _total(difference: float, spread: Spread, case: Case) -> int:
    """Seeds that show a difference; and if there is a margin, that there is none as large.

    Raises:
        ValueError: more than 100,000
    """
    level, floor = case.look.last_level, spread.floor
    total = power.seeds_to_see(difference, case.sd, spread.dof, case.comparisons, level=level, floor=floor)
    if not case.sweep.design.within:
        return total
    enough = range(max(total, 2), power.MOST + 1)

    def shows(n: int) -> bool:
        return margin_seen(case.sd, n, dof=spread.dof(n), floor=floor) <= difference

    at = bisect_left(enough, True, key=shows)
    if at == len(enough):
        raise ValueError(f"a margin of {difference:g} at a noise of {case.sd:g} needs more than {power.MOST:,} seeds")
    return enough[at]


def _minutes(further: int, case: Case) -> float | None:
    design = case.sweep.design
    known = [s for run in (*case.arm.runs, *case.other.runs) if (s := run.result.fit_seconds) is not None]
    of_a_job = design.seconds_a_job or (median(known) if known else None)
    jobs = math.ceil(further * case.arms / (design.workers or 1))
    return None if of_a_job is None else jobs * of_a_job / 60


SPENDS: dict[Spend, str] = {"obrien_fleming": "O'Brien–Fleming", "pocock": "Pocock"}
LEAST_EXCESS = 0.005  # σ


def different(case: Case) -> str:
    """``gqa is worse than mha by 0.015 ± 0.006 nats (8 seeds, p = 0.004 of 3 comparisons, rates tuned alike; …).``"""
    start = f"{case.arm.name} is {case.kind} than {case.other.name}"
    if case.evidence.solved is not None:
        return f"{start}: {_shares(case)} ({_p(case)})."
    low, high = case.interval or (case.difference, case.difference)
    places = decimals((high - low) / 2)
    amount = f"{plain(abs(case.difference), places)} ± {plain((high - low) / 2, places)}{case.unit}"
    about = ", ".join(filter(None, (seeds(case.comparison.difference.n), _p(case), _tuning(case))))
    return f"{start} by {amount} ({about}{_sees(case)}).{_stopped(case, _excess(case))}"


def same(case: Case) -> str:
    """``gqa and mha are the same within 0.010 nats (+0.002, 90 % interval −0.004 to +0.008).``"""
    start = f"{case.arm.name} and {case.other.name} are the same"
    margin, noise, mean = case.sweep.design.within, case.comparison.noise, case.difference
    if not any(case.comparison.by_seed.values()) or margin is None or noise is None:
        return f"{start} to the last digit ({seeds(case.comparison.difference.n)})."
    level = 1 - 2 * case.look.margin_level
    half = noise.half(case.comparison.difference.n, level)
    places = decimals(half)
    ends = f"{signed(mean - half, places)} to {signed(mean + half, places)}"
    interval = f"{signed(mean, places)}, {100 * level:.3g} % interval {ends}"
    return f"{start} within {small(margin)}{case.unit} ({interval}).{_stopped(case)}"


def undecided(case: Case, need: Need | None) -> str:
    """``Undecided: gqa − mha is between −0.010 and +0.040 nats (…). To see 0.010: about 10 more seeds, 35 minutes.``"""
    if case.evidence.solved is not None:
        return f"Undecided: {_shares(case)} ({_p(case)})."
    low, high = case.interval or (case.difference, case.difference)
    places = decimals((high - low) / 2)
    between = f"between {signed(low, places)} and {signed(high, places)}{case.unit}"
    about = f"{seeds(case.comparison.difference.n)}, {_alone(case)}{_sees(case)}"
    text = f"Undecided: {case.arm.name} − {case.other.name} is {between} ({about})."
    if need is None:
        return text
    time = "" if need.minutes is None else f", {duration(need.minutes)}"
    return f"{text} To see {small(need.difference)}: about {need.seeds:,} more seed{'s' * (need.seeds != 1)}{time}."


def without(case: Case) -> str:
    """A sentence on each side's lost seeds, where they do not change the verdict; else empty."""
    sides = [(side, lost) for side in (case.arm, case.other) if (lost := case.lost(side))]
    return "".join(f" Of {seeds(case.look.seeds)} of {side.name}, {states(lost)}." for side, lost in sides)


def small(value: float) -> str:
    """An amount in two digits: 0.010."""
    return plain(value, decimals(value))


def duration(minutes: float) -> str:
    """The largest fitting unit of time, whole."""
    for size, unit in ((24 * 60.0, "day"), (60.0, "hour"), (1.0, "minute")):
        if minutes >= 2 * size or (unit == "minute" and minutes >= 1):
            return f"{minutes / size:.0f} {unit}{'s' * (round(minutes / size) != 1)}"
    return "under a minute"


def _shares(case: Case) -> str:
    shares = case.evidence.solved
    assert shares is not None
    ours, theirs = (f"{of.solved} of {of.n}" for of in (shares.ours, shares.theirs))
    return f"{ours} seeds of {case.arm.name} solved it, {theirs} of {case.other.name}"


def _p(case: Case) -> str:
    many = case.evidence.comparisons
    return f"{probability(case.comparison.corrected)}{f' of {many} comparisons' if many > 1 else ''}"


def _alone(case: Case) -> str:
    """Explains an interval that leaves out 0 where the verdict is open: the correction is why."""
    alone = case.comparison.p
    return _p(case) if alone is None or alone >= case.look.level else f"alone {probability(alone)}, {_p(case)}"


def _tuning(case: Case) -> str:
    ours, theirs = case.arm, case.other
    if not ours.tuned or not theirs.tuned:
        return ""
    what = "rates" if {each.path for each in (*ours.tuned, *theirs.tuned)} == {RATE} else "settings"
    if ours.tries != theirs.tries:
        return f"{what} tuned by {ours.tries} and {theirs.tries} tries"
    return f"{what} tuned alike" if ours.arm.of(TUNE) else f"each at the best of {ours.tries} {what}"


def _sees(case: Case) -> str:
    least = sees(case.evidence)
    return "" if least is None else f"; this sweep sees {small(least)} four times in five"


def _excess(case: Case) -> float:
    """By how many σ the estimate of a sweep that stopped early is too large; 0 of all planned seeds."""
    design = case.sweep.design
    if not case.look.is_early or not case.sd:
        return 0.0
    return overestimate(design.looks, design.spend, case.difference / case.sd)


def _stopped(case: Case, excess: float = 0.0) -> str:
    if not case.look.is_early:
        return ""
    spend = SPENDS[case.sweep.design.spend]
    text = f" Stopped at {case.look.seeds} of {case.look.most} seeds ({spend})"
    if excess < LEAST_EXCESS:
        return f"{text}."
    by = f"{excess:.2f} σ ({small(excess * case.sd)}{case.unit})"
    return f"{text}; estimates at an early stop are too large by about {by}."


# --- how a sweep was judged -------------------------------------------------------------------------------------------


NOT_CALIBRATED = "The instrument was not calibrated on this machine (blockwright calibrate)."


def basis(findings: Findings) -> str:
    """The method, and whether known effects are found with it on this machine; empty where nothing is tested."""
    text = method(findings)
    return text and f"{text} {calibration(findings) or NOT_CALIBRATED}"


def calibration(findings: Findings) -> str | None:
    """The sentence on the last calibration of this machine; None if there was none."""
    from blockwright.lab.calibration.record import line_above  # it imports what trains

    return line_above(findings.sweep.directory)


def method(findings: Findings) -> str:
    """The statistical method; empty where nothing is tested."""
    looked = [f.evidence for f in findings.others if f.evidence and f.evidence.look]
    if any(each.solved for each in looked):
        return f"p is of Boschloo's exact test on the seeds that solved the task{_correction(findings)}."
    tested = [each for each in looked if each.spread]
    if not tested:
        return ""
    interval = "an interval at the level of the look" if findings.sweep.design.looks else "a 95 % interval"
    said = f"± is {interval}; p is of a t-test of paired differences, {_variance(tested)}{_correction(findings)}."
    return " ".join(filter(None, (said, _level(findings), _could_see(tested, findings), _untuned(findings))))


def _variance(tested: list[Evidence]) -> str:
    spreads = [each.spread for each in tested if each.spread]
    pooled = [spread.noise.arms for spread in spreads if spread.noise.arms > 2]
    over = f"pooled over {' or '.join(map(str, sorted({*pooled})))} arms, that of the one compared with apart"
    of = over if pooled else "of each pair"
    if 0 < len(pooled) < len(spreads):
        of = f"{of}, or of the pair where an arm is noisier or lacks seeds"
    bank = max((spread.bank for spread in spreads), default=0.0)
    dof = " or ".join(map(str, sorted({round(spread.noise.dof) for spread in spreads})))
    with_bank, share = (" and over earlier sweeps", f", {bank:g} of them theirs") if bank else ("", "")
    floor = max((spread.floor for spread in spreads), default=0.0)
    tuning = f" and of what tuning leaves (± {small(floor)})" if floor else ""
    return f"with the variance {of}{with_bank} ({dof} degrees of freedom{share}){tuning}"


def _untuned(findings: Findings) -> str:
    """Of arms at one rate, of which some may have had a better one for them than others."""
    sweep = findings.sweep
    if sweep.kind != "ablation" or any(f.tuned for f in findings.arms):
        return ""
    rate = (
        "the one rate that it was composed with" if sweep.design.rate is None else f"the rate {sweep.design.rate:.3g}"
    )
    return f"No rate was tuned: every arm was compared at {rate}, unless its overrides set another."


def _correction(findings: Findings) -> str:
    number = findings.comparisons
    return f", corrected for {number} comparisons at once (Holm)" if number > 1 else ""


def _level(findings: Findings) -> str:
    design = findings.sweep.design
    if not design.looks:
        return "A difference counts at p < 0.05."
    spend = SPENDS[design.spend]
    looks = ", ".join(map(str, design.looks))
    return f"It is looked at {looks} seeds, with the level shared among these looks ({spend}), 0.05 in all."


def _could_see(tested: list[Evidence], findings: Findings) -> str:
    known = [value for each in tested if (value := sees(each)) is not None]
    if not known:
        return ""
    unit = f" {findings.sweep.unit}".rstrip()
    return f"This sweep sees {small(max(known))}{unit} four times in five."
