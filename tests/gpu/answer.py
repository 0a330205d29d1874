"""The answer of one case."""

from __future__ import annotations

from typing import Any

PASS, FAIL, NOT_REACHED, NOT_APPLICABLE = "pass", "fail", "not reached", "not applicable"


def passed(**figures: Any) -> dict[str, Any]:
    """It holds, with what was measured."""
    return {"result": PASS, "detail": "", "figures": figures}


def held(holds: bool, detail: str, **figures: Any) -> dict[str, Any]:
    """Whether it holds, and why not."""
    return {"result": PASS if holds else FAIL, "detail": "" if holds else detail, "figures": figures}


def not_applicable(why: str) -> dict[str, Any]:
    """There is nothing to try here."""
    return {"result": NOT_APPLICABLE, "detail": why, "figures": {}}
