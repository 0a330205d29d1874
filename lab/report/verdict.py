"""The verdict on each arm of a sweep: better, worse, the same, undecided, or none and why.

A script obeys ``kind``, ``why`` and ``needs_seeds``; ``text`` says the same in one or two sentences.
``verdict.json`` holds them; docs/how-to/report.md lists its keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from blockwright.lab.report import sentences
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.sentences import Case, Decision, calibration, method, need, sees, states
from blockwright.lab.report.words import seeds
from blockwright.lab.statistics.variance import Noise

# --- why there is no verdict on an arm: it is not tuned, not finished, lost, has one seed, or shows no noise ----------


Why = Literal["untuned", "unfinished", "lost", "no_common_seed", "one_seed", "lost_seeds", "no_noise"]


@dataclass(frozen=True)
class Obstacle:
    """What stands against a verdict: for a script, and as a clause."""

    why: Why
    text: str


def obstacle(arm: Finding, other: Finding, findings: Findings) -> Obstacle | None:
    """What stands against any verdict; None if nothing does."""
    for side in (arm, other):
        if found := _of_side(side, findings):
            return found
    names, evidence = f"{arm.name} and {other.name}", arm.evidence
    if evidence is None or evidence.comparison is None:
        return Obstacle("no_common_seed", f"{names} have no finished seed in common")
    if evidence.look is None:
        pending = {run.seed for side in (arm, other) for run in side.runs if run.is_pending}
        ended = len([seed for seed in evidence.seeds if seed not in pending])
        return Obstacle("unfinished", f"{ended} of the {len(evidence.seeds)} seeds of {names} have ended")
    if evidence.comparison.p is None and evidence.comparison.difference.n > 1:
        same = "have the same value" if not evidence.comparison.difference.mean else "differ by the same amount"
        rule = "which says nothing: the figure has too coarse steps, or is at its bound"
        return Obstacle("no_noise", f"{names} {same} at every seed, {rule}. Compare by a finer one")
    if evidence.comparison.p is None:
        return Obstacle("one_seed", f"one seed cannot say whether {arm.name} differs from {other.name}")
    return None


def _of_side(side: Finding, findings: Findings) -> Obstacle | None:
    if ends := [each for each in side.tuned if each.edge and not each.pending]:
        return Obstacle("untuned", f"the best {ends[0].name} of {side.name} is the {ends[0].edge} tried")
    if not side.runs and side.tuned:
        return Obstacle("unfinished", f"{side.name} is still being tuned ({side.tries} tries have ended)")
    if not side.values and any(run.is_pending for run in side.runs):
        return Obstacle("unfinished", f"{side.name} has no result yet")
    return None if side.values else Obstacle("lost", f"{side.name} is lost: {_loss(side, findings)}")


def _loss(side: Finding, findings: Findings) -> str:
    if not side.runs:
        return "it has no runs"
    reasons = Counter(findings.why_lost(run).splitlines()[0] for run in side.runs)
    (reason, count), several = reasons.most_common(1)[0], len(side.runs) > 1
    of = f"{count} of {len(side.runs)} runs " if several else ""
    return f"{of}{reason}".rstrip(".")


def flattery(case: Case, kind: Decision) -> Obstacle | None:
    """A side that loses its bad seeds looks better than it is. None if none has, or if the verdict is against it."""
    for side, harsh in ((case.arm, "worse"), (case.other, "better")):
        if kind != harsh and (lost := case.lost(side)):
            of = f"{len(lost)} of {seeds(case.look.seeds)} of {side.name} {'is' if len(lost) == 1 else 'are'} lost"
            return Obstacle(
                "lost_seeds", f"{of} ({states(lost)}), and an arm without its bad seeds looks better than it is"
            )
    return None


Kind = Literal["better", "worse", "same", "undecided", "none"]
DECIDED, UNDECIDED, WITHOUT = 0, 3, 4  # exit codes; 1, 2, 64, 70 and 75 have other meanings


@dataclass(frozen=True)
class Verdict:
    """The verdict on one arm.

    Args:
        arm, against: names of the arm and of the one that it is compared with
        kind: ``none`` if the sweep cannot say anything, because of ``why``
        text: in words
        why: of ``none``; else None
        difference: mean of arm − against over the seeds, in the unit of the metric; of solved tasks, of the shares
        interval: of the difference, at the level of the look: 95 % of a fixed number of seeds
        p: after Holm's correction
        seeds: that were compared
        sees: smallest difference that the sweep shows four times in five
        needs_seeds: further seeds for a verdict, about; None if decided, or not known
        minutes: that they take, for all arms
        noise: σ of a paired difference, its degrees of freedom and where it is from
    """

    arm: str
    against: str
    kind: Kind
    text: str
    why: Why | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    seeds: int = 0
    sees: float | None = None
    needs_seeds: int | None = None
    minutes: float | None = None
    noise: Noise | None = None

    @property
    def is_decided(self) -> bool:
        return self.kind in ("better", "worse", "same")


def verdicts(findings: Findings) -> list[Verdict]:
    """The verdicts on all arms but the baseline, in the plan's order; none on the trials of a search."""
    return [verdict(arm, findings) for arm in findings.others] if findings.sweep.kind != "search" else []


def exit_code(every: Sequence[Verdict]) -> int:
    """0: all are decided; 3: some are undecided; 4: on some there is no verdict."""
    kinds = {each.kind for each in every}
    return WITHOUT if "none" in kinds else UNDECIDED if "undecided" in kinds else DECIDED


def verdict(arm: Finding, findings: Findings) -> Verdict:
    """The verdict on an arm that is compared with another."""
    other = findings.named(arm.against)
    against = obstacle(arm, other, findings)
    evidence = arm.evidence
    if against or evidence is None or evidence.look is None or evidence.comparison is None:
        why, text = (against.why, against.text) if against else (None, "nothing is compared")
        return Verdict(arm.name, other.name, "none", f"No verdict: {text}.", why)
    arms = sum(bool(each.runs) for each in findings.arms)
    return _at_look(Case(arm, other, findings.sweep, evidence, evidence.look, evidence.comparison, arms))


def _at_look(case: Case) -> Verdict:
    kind: Kind = case.kind
    more = need(case) if case.kind == "undecided" else None
    says = {"same": sentences.same, "better": sentences.different, "worse": sentences.different}
    text = says[kind](case) if kind in says else sentences.undecided(case, more)
    text, why = f"{text}{sentences.without(case)}", None
    if against := flattery(case, case.kind):
        kind, why, text, more = "none", against.why, f"No verdict: {against.text}.", None
    return Verdict(
        case.arm.name,
        case.other.name,
        kind,
        text,
        why,
        case.difference,
        case.interval,
        case.comparison.corrected,
        case.comparison.difference.n,
        sees(case.evidence),
        more.seeds if more else None,
        more.minutes if more else None,
        case.comparison.noise,
    )


SCHEMA = "blockwright.verdict/1"  # another number, if a key is removed or changes its meaning; keys may be added


def document(findings: Findings) -> dict[str, Any]:
    """The verdicts, how they were reached, and the exit code of ``blockwright verdict``.

    Args:
        findings: of a sweep that is no search
    """
    sweep, every = findings.sweep, verdicts(findings)
    design = sweep.design
    return {
        "schema": SCHEMA,
        "sweep": sweep.name,
        "metric": sweep.metric,
        "unit": sweep.unit,
        "better": "more" if sweep.maximize else "less",
        "baseline": findings.baseline.name,
        "within": design.within,
        "looks": {"seeds": list(design.looks), "spend": design.spend} if design.looks else None,
        "comparisons": findings.comparisons,
        "method": method(findings),
        "calibration": calibration(findings),
        "verdicts": [asdict(each) for each in every],
        "exit_code": exit_code(every),
    }
