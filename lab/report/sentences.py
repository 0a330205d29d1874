"""Verdicts in words."""

from __future__ import annotations

from blockwright.lab.report.case import Case, Need, sees, states
from blockwright.lab.report.evidence import Evidence
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.words import decimals, plain, probability, seeds, signed
from blockwright.lab.statistics.looks import Spend, overestimate
from blockwright.lab.sweep.tuning import RATE, TUNE

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
