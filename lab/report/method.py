"""How a sweep was judged, in two sentences: which variance, which correction, which level, and what it could see."""

from __future__ import annotations

from blockwright.lab.report.case import sees
from blockwright.lab.report.evidence import Evidence
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.sentences import SPENDS, small

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
    return " ".join(filter(None, (said, _level(findings), _sees(tested, findings), _untuned(findings))))


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


def _sees(tested: list[Evidence], findings: Findings) -> str:
    known = [value for each in tested if (value := sees(each)) is not None]
    if not known:
        return ""
    unit = f" {findings.sweep.unit}".rstrip()
    return f"This sweep sees {small(max(known))}{unit} four times in five."
