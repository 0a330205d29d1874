"""``verdict.json``: the verdicts of a sweep for a script. docs/how-to/report.md lists its keys."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from blockwright.lab.report.findings import Findings
from blockwright.lab.report.sentences import calibration, method
from blockwright.lab.report.verdict import exit_code, verdicts

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


def as_json(document: dict[str, Any]) -> str:
    """The text of a document, of this or of another report; JSON has no infinite numbers, which become null."""
    return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
