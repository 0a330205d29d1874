"""Plans that grow: a design adds jobs by the results so far, and a sweep that was killed continues to the same jobs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from stand_in import STAND_IN, calls, make_plan, statuses, until
from warm import Running, Warm

from blockwright.lab.sweep import designs, endings, locks, runner
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.__main__ import main
from blockwright.registry import ConfigError
from blockwright.training.result import Result

ROOT = Path(__file__).resolve().parents[3]


def halving(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[dict[str, Any]]:
    """Two jobs of half the best loss, until it is at most 1."""
    values = [value for result in results.values() if (value := result.value("val/loss")) is not None]
    if not values or min(values) <= 1:
        return []
    how, n = "wait" if (directory / "slow").exists() else "ok", len(results)
    overrides = [f"do={how}", f"loss={min(values) / 2}"]
    return [{"job": n + i, "stage": f"round {n // 2}", "overrides": [f"seed={i}", *overrides]} for i in range(2)]


def repeating(directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> list[dict[str, Any]]:
    return [{"job": 0, "overrides": []}]


DESIGNS = {"halving": halving, "repeating": repeating}


class Counting:
    """An ending that writes how many jobs have ended, a line each time."""

    def need_packages(self) -> None:
        if Path("lacking").exists():
            raise ConfigError("lab", None, "is missing", "Install it")

    def conclude(self, directory: Path, plan: Mapping[str, Any], results: Mapping[int, Result]) -> None:
        with (directory / "ended").open("a") as file:
            print(len(plan["jobs"]), sum(result.ended for result in results.values()), file=file)


ENDINGS = {"halving": Counting()}


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Code that offers the designs of this file, in this process and in those that run it."""
    monkeypatch.setattr(designs, "entry_points", points)
    monkeypatch.setattr(endings, "entry_points", points)
    (file := tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr("blockwright.training.jobs.TRAIN", (str(file),))
    monkeypatch.setattr("blockwright.lab.sweep.forking.IMPORTED", ())  # it needs none
    return f"""
import importlib.util, sys
from blockwright.lab.sweep import designs, endings, forking
from blockwright.training import jobs
jobs.TRAIN, forking.IMPORTED = ({str(file)!r},), ()
sys.path[:0] = [{str(ROOT / "tests" / "lab")!r}, {str(ROOT / "tests")!r}]
spec = importlib.util.spec_from_file_location("growing", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
designs.entry_points = endings.entry_points = module.points
"""


class Offered(EntryPoint):
    """An entry point whose object is in this file, which no name imports."""

    def load(self) -> Any:
        return ENDINGS[self.name] if self.group == endings.ENTRY_POINTS else DESIGNS[self.name]


def points(group: str) -> list[EntryPoint]:
    offered = {designs.ENTRY_POINTS: DESIGNS, endings.ENTRY_POINTS: ENDINGS}.get(group, {})
    return [Offered(name, "unused", group) for name in offered]


@pytest.fixture
def started(offered: str, warm: Warm, environment: dict[str, str]) -> Callable[[Path], Running]:
    def start(sweep: Path) -> Running:
        code = f"{offered}\nfrom pathlib import Path\nfrom blockwright.lab.sweep import runner\n"
        code += f"sys.exit(runner.run_plan(Path({str(sweep)!r})))"
        return warm.start("-c", code, cwd=ROOT, env=environment)

    return start


def losses(sweep: Path) -> list[str]:
    return [job["overrides"][-1] for job in plans.read(sweep)["jobs"]]


WHOLE = ["loss=4", "loss=3", "loss=1.5", "loss=1.5", "loss=0.75", "loss=0.75"]


def growing(folder: Path, **more: Any) -> Path:
    return make_plan(folder, "do=ok loss=4", "do=ok loss=3", kind="halving", **more)


def test_plan_grows_until_its_design_has_no_more(offered: str, tmp_path: Path) -> None:
    sweep = growing(tmp_path / "sweep")
    assert runner.run_plan(sweep) == 0
    assert losses(sweep) == WHOLE and statuses(sweep) == ["completed"] * 6
    assert all(len(calls(sweep / str(n))) == 1 for n in range(6))
    assert all((Result.read(sweep / str(n)).wall_seconds or 0) > 0 for n in range(6))
    assert (sweep / "ended").read_text() == "6 6\n"
    assert runner.run_plan(sweep) == 0 and losses(sweep) == WHOLE  # it has ended


def test_sweep_killed_in_a_grown_job_resumes_to_the_same_jobs(
    started: Callable[[Path], Running], tmp_path: Path
) -> None:
    sweep = growing(tmp_path / "sweep")
    (sweep / "slow").touch()
    process = started(sweep)
    until(lambda: (sweep / "2" / "waits").exists() and (sweep / "3" / "waits").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert losses(sweep) == WHOLE[:4]
    (sweep / "go").touch()
    until(lambda: not locks.is_taken(sweep))
    assert main(["resume", str(sweep)]) == 0
    assert losses(sweep) == WHOLE and statuses(sweep) == ["completed"] * 6
    assert (sweep / "ended").read_text() == "6 6\n"


def test_sweep_killed_between_jobs_resumes_to_the_same_jobs(offered: str, tmp_path: Path) -> None:
    """With all of a stage done, it was killed before the plan had grown."""
    sweep = growing(tmp_path / "sweep")
    runner.run_plan(sweep, jobs=range(2))
    assert losses(sweep) == WHOLE[:2]
    assert main(["resume", str(sweep)]) == 0 and losses(sweep) == WHOLE


def test_stopped_sweep_does_not_grow(started: Callable[[Path], Running], tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=4", "do=wait loss=3", kind="halving")
    process = started(sweep)
    until(lambda: (sweep / "1" / "waits").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75 and len(losses(sweep)) == 2 and not (sweep / "ended").exists()


def test_sweep_whose_every_job_is_lost_is_not_concluded(offered: str, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=crash", kind="halving")
    assert runner.run_plan(sweep) == 1 and not (sweep / "ended").exists()


@pytest.mark.parametrize("action", ["resume", "retry"])
def test_sweep_that_could_not_be_concluded_is_refused_before_its_jobs(
    action: str, offered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = growing(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacking").touch()
    with pytest.raises(ConfigError, match="Install it"):
        main([action, str(sweep)])
    assert not (sweep / "0").exists()


@pytest.mark.slow
def test_failed_jobs_have_ended_and_retried_ones_alone_do_not_grow_it(offered: str, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=crash", "do=ok loss=2", kind="halving")
    assert runner.run_plan(sweep, jobs=[0]) == 0 and len(losses(sweep)) == 2
    assert main(["retry", str(sweep), "--jobs", "0"]) == 0 and len(losses(sweep)) == 2
    assert runner.run_plan(sweep) == 0 and losses(sweep)[2:] == ["loss=1.0", "loss=1.0"]


def test_design_with_jobs_that_no_plan_can_have_is_refused(offered: str, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=4", kind="repeating")
    with pytest.raises(ConfigError, match="two of its jobs have one number"):
        runner.run_plan(sweep)
    assert len(losses(sweep)) == 1


def test_kind_without_a_design_is_no_plan(offered: str, tmp_path: Path) -> None:
    sweep = make_plan(tmp_path / "sweep", "do=ok loss=4", kind="doubling")
    with pytest.raises(ConfigError, match="is not a sweep's plan"):
        runner.run_plan(sweep)


def test_status_counts_the_jobs_of_each_stage(offered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = growing(tmp_path / "sweep")
    runner.run_plan(sweep)
    (sweep / "5" / "results.json").unlink()
    capsys.readouterr()
    assert main(["status", str(sweep)]) == 0
    shown = capsys.readouterr().out
    assert "stage round 1: 2 of 2 jobs have ended" in shown and "stage round 2: 1 of 2 jobs have ended" in shown
    main(["status", str(sweep), "--json"])
    assert [job["stage"] for job in json.loads(capsys.readouterr().out)["jobs"]][2:] == ["round 1"] * 2 + [
        "round 2"
    ] * 2
