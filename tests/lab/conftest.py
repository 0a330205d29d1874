"""Jobs of sweeps without the seconds of their imports."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from warm import Running, Warm

from blockwright.lab.sweep import runner


class Forked:
    """The part of ``subprocess`` that starts jobs: each is forked from a process that has loaded the imports."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT

    def __init__(self, warm: Warm) -> None:
        self.warm = warm

    def Popen(  # noqa: N802 # its name
        self, arguments: Sequence[str], *, stdout: IO[bytes], cwd: str | None, env: Mapping[str, str], **ignored: Any
    ) -> Running:
        log = Path(stdout.name).resolve()
        return self.warm.start(*arguments[1:], cwd=Path(cwd or "."), env=env, log=log)


@pytest.fixture
def forked_jobs(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that this process runs start their jobs warm; tests of the command itself start them cold."""
    monkeypatch.setattr(runner, "subprocess", Forked(warm))
