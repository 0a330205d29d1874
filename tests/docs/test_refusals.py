"""The refusals on their page are what the commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from blockwright.command import run
from blockwright.registry.command import run_command

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "refusals.md"
EXAMPLES = re.findall(r"```console\n\$ blockwright (.+)\n((?:.+\n)+?)```", PAGE.read_text())


def test_page_has_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_refusal_is_what_the_page_shows(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run, shlex.split(command)) == 64
    printed = capsys.readouterr().err
    assert re.fullmatch(".*".join(map(re.escape, shown.split("…"))), printed), printed
