"""Why there is no verdict on an arm: it is not tuned, not finished, lost, or has one seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from blockwright.lab.report.case import Case, Decision, states
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.words import seeds

Why = Literal["untuned", "unfinished", "lost", "no_common_seed", "one_seed", "lost_seeds"]


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
