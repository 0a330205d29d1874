"""Jobs of sweeps without the seconds of their imports."""

from functools import partial
from pathlib import Path

import pytest
from stand_in import STAND_IN

from blockwright.lab.sweep import runner
from blockwright.lab.sweep.forking import Processes


class Forked(Processes):
    """Jobs forked from the tests' own process, which has loaded the imports for all tests."""

    def __init__(self, warm, cwd, environment, lock):
        super().__init__(cwd, environment, lock)
        self.warm = warm

    def start(self, arguments, log):
        path = Path(log.name).resolve()
        return self.warm.start(*arguments, cwd=Path(self.cwd or "."), env=self.environment, log=path)


@pytest.fixture
def forked_jobs(warm, monkeypatch):
    """Sweeps that this process runs start their jobs warm; tests of the command itself start them cold."""
    monkeypatch.setattr(runner, "Processes", partial(Forked, warm))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The script that takes the place of train.py, and needs no imports."""
    (file := tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr("blockwright.training.jobs.TRAIN", (str(file),))
    monkeypatch.setattr("blockwright.lab.sweep.forking.IMPORTED", ())
    return file


@pytest.fixture
def run_apart(stand_in, warm, environment):
    """``run_plan`` of a folder in a process of its own, after some code."""

    def start(sweep, first=""):
        code = f"""
import sys
from pathlib import Path
from blockwright.lab.sweep import forking, runner
from blockwright.training import jobs
jobs.TRAIN, forking.IMPORTED = ({str(stand_in)!r},), ()
{first}
sys.exit(runner.run_plan(Path({str(sweep)!r})))
"""
        return warm.start("-c", code, cwd=Path(__file__).resolve().parents[2], env=environment)

    return start
