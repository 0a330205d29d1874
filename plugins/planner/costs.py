"""What a layout's training costs in all: hours, energy and money; and a candidate as plain numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from blockwright.plugins.planner.hardware import Hardware
from blockwright.plugins.planner.layout import Job
from blockwright.plugins.planner.measure import Measured
from blockwright.plugins.planner.request import Settings
from blockwright.plugins.planner.search import ERROR, Candidate
from blockwright.plugins.planner.traffic import traffic


def totals(candidate: Candidate, hardware: Hardware, settings: Settings) -> dict[str, Any]:
    """GPU-hours, days, energy and money of a run; null where tokens or prices are not given."""
    if settings.tokens is None:
        return dict.fromkeys(("gpu_hours", "days", "kwh", "money"))
    hours = settings.tokens / candidate.speed / 3600
    kwh = hours * hardware.watts * settings.overhead / 1000
    paid = [n * price for n, price in ((hours, settings.gpu_hour), (kwh, settings.kwh)) if price is not None]
    return {"gpu_hours": hours, "days": hours / settings.gpus / 24, "kwh": kwh, "money": sum(paid) if paid else None}


def mfu(candidate: Candidate, hardware: Hardware) -> float:
    """Model FLOPs, scores halved for causality, of the bf16 peak, whatever the precision."""
    return candidate.step.flops_per_second / hardware.bf16


def as_plain(
    candidate: Candidate,
    best: Candidate,
    measured: Measured,
    job: Job,
    hardware: Hardware,
    settings: Settings,
) -> dict[str, Any]:
    """A row of ``--json``: SI units throughout."""
    return {
        "layout": asdict(candidate.layout),
        "runs_here": candidate.layout.trains_here(job),
        "step_seconds": candidate.step.seconds,
        "tokens_per_second_and_gpu": candidate.speed,
        "flops_per_second_and_gpu": candidate.step.flops_per_second,
        "mfu": mfu(candidate, hardware),
        "seconds": candidate.step.parts,
        "memory_bytes": candidate.memory,
        "traffic_bytes": traffic(measured, job, candidate.layout),
        "slower_than_best": best.speed / candidate.speed - 1,
        "tie": is_tie(candidate, best),
        "loses_by_seconds": losses(candidate, best),
        **totals(candidate, hardware, settings),
    }


def is_tie(candidate: Candidate, best: Candidate) -> bool:
    """Whether the model cannot tell which of the two is faster."""
    return best.speed / candidate.speed - 1 <= ERROR


def losses(candidate: Candidate, best: Candidate) -> dict[str, float]:
    """Part of a step → by how many seconds more than the best it takes, the most first; less is negative."""
    names = dict.fromkeys((*best.step.parts, *candidate.step.parts))
    more = {n: candidate.step.parts.get(n, 0.0) - best.step.parts.get(n, 0.0) for n in names}
    return dict(sorted(more.items(), key=lambda item: -item[1]))
