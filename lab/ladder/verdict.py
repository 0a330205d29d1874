"""The verdict of a ladder on each arm: what it is worth in compute, or why the ladder cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from blockwright.lab.ladder.findings import Findings, of_rungs, over_all
from blockwright.lab.report.words import around, plain, probability
from blockwright.lab.statistics.intervals import LEVEL, holm
from blockwright.lab.statistics.law_check import Conclusion, Why
from blockwright.lab.statistics.law_fit import Estimate, spans_best_split, speed_up_along
from blockwright.lab.statistics.tuning import ENDS, Edge

SCHEMA = "blockwright.ladder/2"  # another number, if a key is removed or changes its meaning; keys may be added
Kind = Literal["better", "worse", "undecided", "none"]
Reason = Literal["untuned", "law", "few", "lost"]
Place = Literal["best split", "tokens per parameter"]
PLACES: Mapping[Place, str] = {
    "best split": "at the best split",
    "tokens per parameter": "at equal tokens per parameter",
}
ALIKE: Mapping[Why, tuple[str, str]] = {  # why size and data are not fitted apart, and what to add
    "size": ("There is one size", "Add two sizes"),
    "durations": (
        "Every size has one duration, so size and data rise together",
        "Add a decay at a quarter of the tokens",
    ),
    "sizes": ("Two sizes fix no exponent", "Add a third size"),
    "tokens": ("Two numbers of tokens fix no exponent", "Add a third duration"),
    "condition": ("Its sizes and durations do not fix the shape of the law", "Spread the sizes and durations"),
    "width": ("So few trainings do not separate size from data", "Add seeds, or spread the sizes"),
}


@dataclass(frozen=True)
class Speed:
    """A speed-up s, and its 95 % interval."""

    s: float
    low: float
    high: float

    @classmethod
    def of(cls, log_s: Estimate) -> Speed:
        return cls(*map(_exp, (log_s.mean, log_s.low, log_s.high)))

    def times(self, factor: float) -> Speed:
        return Speed(self.s * factor, self.low * factor, self.high * factor)

    @property
    def is_one(self) -> bool:
        """Whether the interval holds 1."""
        return self.low <= 1 <= self.high

    @property
    def seen(self) -> float:
        """The speed-up that such an interval about 1 would exclude, less 1."""
        return math.sqrt(self.high / self.low) - 1 if self.low else math.inf

    def __str__(self) -> str:
        return f"{_number(self.s)} ({_number(self.low)} to {_number(self.high)})"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one arm.

    Args:
        arm, against: names of the arm and of the baseline
        kind: ``none`` if the ladder cannot say anything, because of ``why``
        text: in words
        why: of ``none``; else None
        speed_up: s: how many times the parameters × tokens the baseline needs
        at_equal_flops: the same in training FLOPs, which differ per parameter and token
        by_clock: the same in time, at the measured throughput; None if unknown
        if_alike: whether that holds only if size and data gain alike
        at: where: at the best split of the compute, or at the tokens per parameter of the largest rung
        p: of the test that it is 1 at equal training FLOPs, after Holm's correction over all arms
    """

    arm: str
    against: str
    kind: Kind
    text: str
    why: Reason | None = None
    speed_up: Speed | None = None
    at_equal_flops: Speed | None = None
    by_clock: Speed | None = None
    if_alike: bool = False
    at: Place | None = None
    p: float | None = None


def verdicts(findings: Findings) -> list[Verdict]:
    """Of every arm but the baseline."""
    law, arms = findings.law, findings.arms[1:]
    against = {arm: _obstacle(arm, findings) for arm in arms}
    speeds = {} if law is None else {arm: judged(arm, findings, law) for arm in arms if against[arm] is None}
    corrected = dict(zip(speeds, holm([each.p for each in speeds.values()]), strict=True))
    found = []
    for arm in arms:
        obstacle = against[arm]
        found.append(obstacle or _by_law(arm, findings, speeds[arm], corrected[arm] or 0.0, len(speeds)))
    return found


def verdict(arm: str, findings: Findings) -> Verdict:
    """Of one arm, among all."""
    return next(each for each in verdicts(findings) if each.arm == arm)


def _obstacle(arm: str, findings: Findings) -> Verdict | None:
    """Why there is none on an arm."""
    against, law = findings.baseline, findings.law
    if untuned := _untuned(arm, findings) or _untuned(against, findings):
        return Verdict(arm, against, "none", f"{arm}: no verdict: {untuned}.", "untuned")
    if not any(rung.arm == arm for rung in findings.rungs):
        return Verdict(arm, against, "none", f"{arm} has no result.", "lost")
    if law is None:
        text = f"{arm}: no law through so few trainings. {_rungs(arm, findings)}"
        return Verdict(arm, against, "none", text, "few")
    if law.is_wrong:
        p = "p < 0.0001" if (law.lack_of_fit or 0) < 1e-4 else f"p = {law.lack_of_fit:.2g}"
        misfit = p if law.left_out is None else f"{p}; the largest size is off by {_off(law.left_out)}"
        text = f"{arm}: one law does not fit these arms ({misfit}): no speed-up. {_rungs(arm, findings)}"
        return Verdict(arm, against, "none", text, "law")
    return None


@dataclass(frozen=True)
class Judged:
    """s of an arm where the ladder shows it, and the p of the test that it is 1 at equal training FLOPs."""

    speed: Speed
    at: Place
    p: float


def judged(arm: str, findings: Findings, law: Conclusion) -> Judged:
    """At the best split if the arm's rungs span that, else at the largest rung."""
    one = 1 / findings.flops(arm)
    if law.why_alike is not None or spans_best_split(law.fit):
        log_s = law.fit.speed_up(arm)
        return Judged(Speed.of(log_s), "best split", log_s.p(math.log(one)))
    largest = findings.largest_rung
    found = speed_up_along(law.fit, arm, largest.parameters, largest.tokens, "ratio")
    return Judged(Speed(found.mean, found.low, found.high), "tokens per parameter", found.p(one))


def _by_law(arm: str, findings: Findings, of: Judged, p: float, comparisons: int) -> Verdict:
    law, speed, at = findings.law, of.speed, of.at
    assert law is not None
    equal = speed.times(findings.flops(arm))
    ratio = findings.throughput(arm)
    clock = None if ratio is None else speed.times(ratio)
    kind: Kind = "undecided" if p >= 1 - LEVEL else "better" if equal.s > 1 else "worse"
    says = f"{probability(p)} of {comparisons} comparisons" if comparisons > 1 else probability(p)
    text = " ".join([_sentence(arm, kind, speed, equal, at, findings, says), *_remarks(arm, at, findings, law)])
    alike = law.why_alike is not None
    return Verdict(arm, findings.baseline, kind, text, None, speed, equal, clock, if_alike=alike, at=at, p=p)


def _sentence(arm: str, kind: Kind, speed: Speed, equal: Speed, at: Place, findings: Findings, says: str) -> str:
    """s, and what it means at equal training FLOPs."""
    assert findings.law is not None
    s, why = f"s = {speed}", findings.law.why_alike
    if why is not None and why != "width":
        lacks, remedy = ALIKE[why]
        return f"{lacks}: {arm} has {s} only if both gain alike; no forecast. {remedy}."
    against = findings.baseline
    if abs(math.log(findings.flops(arm))) > 0.01:
        s += f", at equal FLOPs {equal}"
    if kind == "undecided":
        if not equal.is_one:
            return f"{s}: {arm} is not told from {against} {PLACES[at]} ({says})."
        same = f"{s}: {arm} and {against} need the same compute {PLACES[at]}"
        return f"{same}, as far as {100 * equal.seen:.0f} % can be seen."
    share = 1 - 1 / equal.s
    percent = 100 * abs(share)
    amount = f"{percent:.{0 if percent >= 10 else 1}f} % {'less' if share > 0 else 'more'}"
    return f"{s}: {arm} needs {amount} compute than {against} {PLACES[at]} ({says})."


def _remarks(arm: str, at: Place, findings: Findings, law: Conclusion) -> list[str]:
    remarks = []
    if at == "tokens per parameter":
        remarks.append("The best split of its compute lies outside of the ladder.")
    if law.why_alike in (None, "width"):
        remarks.append(_apart(arm, law))
    if law.misses_largest:
        assert law.left_out is not None
        remarks.append(f"The largest size is off the law of the others by {_off(law.left_out)}: no forecast.")
    elif law.fit.is_at_bound and law.why_alike in (None, "width"):
        remarks.append("The ladder does not show the loss that no size and data go below: no forecast.")
    if gone := [each for each in findings.lost if not each.is_unfinished and each.arm == arm]:
        remarks.append(f"{len(gone)} of its trainings are lost.")
    return remarks


def _apart(arm: str, law: Conclusion) -> str:
    """Whether the gain is of size or of data."""
    if law.why_alike is None:
        size, data = law.fit.apart(arm)
        if size.excludes_zero != data.excludes_zero:
            what, gain = ("size", size) if size.excludes_zero else ("data", data)
            return f"The gain is of {what}: as {_number(_exp(gain.mean))} times as much of it."
        if size.excludes_zero:
            times = [_number(_exp(gain.mean)) for gain in (size, data)]
            return f"Its law is that of {times[0]} times the size and {times[1]} times the data."
    return "Size and data are not told apart."


def _untuned(arm: str, findings: Findings) -> str:
    """Why an arm is not tuned, as a clause; empty if it is."""
    for size in findings.outline.tuned_sizes:
        found = findings.tuned.get((size, arm))
        if found is None or all(each.diverged for each in found.tries):
            return f"no value of {findings.outline.tune} trained {arm} at size {size}"
        values = [each.value for each in found.tries if not each.diverged]
        ends: dict[Edge, float] = {"low": min(values), "high": max(values)}
        for edge, value in ends.items():  # the vertex, or the best try
            if found.fit.edge == edge or math.isclose(found.fit.vertex, value):
                return f"the best {findings.outline.tune} of {arm} at size {size} is the {ENDS[edge]} tried"
    return ""


def _off(left_out: Estimate) -> str:
    times = abs(left_out.mean) / left_out.se if left_out.se else math.inf
    return f"{plain(abs(left_out.mean), 3)}, {times:.1f} × what is expected"


def _rungs(arm: str, findings: Findings) -> str:
    """The mean difference over all rungs, and those at the longest duration of each size."""
    mean, found = over_all(findings, arm), of_rungs(findings, arm)
    if mean is None:
        return ""
    longest = {size: found.get((size, of.trunk)) for size, of in findings.outline.sizes.items()}
    parts = [f"{size}: {around(each.interval, sign=True)}" for size, each in longest.items() if each is not None]
    return f"Mean difference over all rungs: {around(mean.interval, sign=True)}; at the longest: {', '.join(parts)}."


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.2g}" if value < 1e6 else "∞"


def document(findings: Findings) -> dict[str, Any]:
    """The verdicts and the law for a script, as in report/verdict.json."""
    law = findings.law
    return {
        "schema": SCHEMA,
        "ladder": findings.plan.get("name"),
        "metric": findings.plan["metric"],
        "baseline": findings.baseline,
        "law": None if law is None else _law(law),
        "verdicts": [asdict(each) | {"difference": _difference(each.arm, findings)} for each in verdicts(findings)],
    }


def _difference(arm: str, findings: Findings) -> dict[str, Any] | None:
    """The mean difference over all rungs, in nats."""
    found = over_all(findings, arm)
    return None if found is None else {**asdict(found.interval), "p": found.p}


def _law(law: Conclusion) -> dict[str, Any]:
    alpha, beta = law.fit.exponents
    off = law.left_out
    return {
        "form": law.fit.ladder.form,
        "why_alike": law.why_alike,
        "floor": law.fit.floor,
        "alpha": alpha,
        "beta": beta,
        "condition": law.fit.condition,
        "lack_of_fit_p": law.lack_of_fit,
        "left_out": None if off is None else {"off": off.mean, "standard_error": off.se},
        "is_wrong": law.is_wrong,
        "forecasts": law.forecasts,
    }
