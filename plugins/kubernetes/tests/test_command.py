"""``blockwright kubernetes``: what has no effect is one message, before anything is read or started."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from blockwright.command import run
from blockwright.registry.command import run_command

# Command line → path of the refusal, and a pattern of its rule.
REFUSED = {
    "kubernetes logs DIR 0 1": ("command line", "unrecognized arguments: 1"),
    "kubernetes logs DIR first": ("command line", "invalid int value"),
    "kubernetes render OUT hydra.launcher.render=X": ("hydra.launcher.render", "render FOLDER"),
    "kubernetes run hydra/launcher=joblib": ("hydra/launcher", "set by the action"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_option_without_effect_is_refused_at_once(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(run, shlex.split(line)) == 64
    said = capsys.readouterr().err
    (found,) = re.findall(r"^error: (.+) = .*\n  rule:   (.+)\n  remedy: .+$", said, re.M)
    path, rule = REFUSED[line]
    assert found[0] == path and re.search(rule, found[1]), said
    assert not list(tmp_path.iterdir())
