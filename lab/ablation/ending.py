"""The end of an ablation: its report, and its noise, which it leaves to later ones in the bank of its log folder."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blockwright.lab.ablation import bank
from blockwright.lab.ablation.bank import Entry
from blockwright.lab.report import build, reading, terminal
from blockwright.lab.report.findings import Findings, find
from blockwright.lab.statistics import variance
from blockwright.lab.statistics.variance import Noise
from blockwright.training.result import Result

PACKAGES = ("blockwright", "torch", "lightning")


def need_packages() -> None:
    """Of ``lab.sweep.seams.Ending``."""
    build.need_packages()


def conclude(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
    """Print the verdicts of an ablation, write its report and record its noise; of ``lab.sweep.seams.Ending``."""
    findings = find(reading.read(directory))
    terminal.show(findings, build.write(findings))
    record(findings, plan, results)


def record(findings: Findings, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
    """Append the noise of an ablation that has ended to the bank, once; nothing if it shows none.

    Args:
        findings: of the folder ``ablation/NAME/TIME`` of a log folder; of another place nothing is recorded
        plan: contents of its plan.json
        results: number → result of each job
    """
    directory = findings.sweep.directory
    if directory.parent.parent.name == "ablation" and (entry := entry_of(findings, plan, results)) is not None:
        bank.append(directory.parents[2], entry)


def entry_of(findings: Findings, plan: Mapping[str, Any], results: Mapping[int, Result]) -> Entry | None:
    """What the bank keeps of an ablation that has ended; None if it shows no noise. Arguments as of ``record``."""
    noise = noise_of(findings)
    if "shape" not in plan or noise is None or not noise.sd:
        return None
    shape = {**asdict(bank.shape_of(plan)), "lr": findings.baseline.lr or plan["shape"].get("lr")}
    took = [result.wall_seconds for result in results.values() if result.wall_seconds and not result.lost]
    return Entry(
        **shape,
        sd=noise.sd,
        dof=noise.dof,
        tuned=bool(plan.get("tune")),
        seeds=tuple(sorted({seed for arm in findings.arms for seed in arm.values})),
        seconds=round(math.fsum(took) / len(took), 1) if took else None,
        workers=plan.get("workers", 1),
        versions={name: version(name) for name in PACKAGES},
        date=f"{datetime.date.today():%Y-%m-%d}",
        name=str(plan.get("name", "")),
        source=str(findings.sweep.directory),
    )


def noise_of(findings: Findings) -> Noise | None:
    """Of a difference to the baseline. None where arms differ in it."""
    table = {arm.name: arm.values for arm in findings.arms if len(arm.values) > 1}
    return variance.of_sweep(table, findings.baseline.name)
