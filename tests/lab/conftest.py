"""Jobs of sweeps without the seconds of their imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from warm import Running, Warm

from blockwright.lab.sweep import runner
from blockwright.lab.sweep.forking import Processes


class Forked(Processes):
    """Jobs forked from the tests' own process, which has loaded the imports for all tests."""

    def __init__(self, warm: Warm, cwd: str | None, environment: Mapping[str, str], lock: int) -> None:
        super().__init__(cwd, environment, lock)
        self.warm = warm

    def start(self, arguments: Sequence[str], log: IO[bytes]) -> Running:
        path = Path(log.name).resolve()
        return self.warm.start(*arguments, cwd=Path(self.cwd or "."), env=self.environment, log=path)


@pytest.fixture
def forked_jobs(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that this process runs start their jobs warm; tests of the command itself start them cold."""
    monkeypatch.setattr(runner, "Processes", partial(Forked, warm))
