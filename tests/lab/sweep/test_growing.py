"""Plans that grow: a design adds jobs by the results so far, and a sweep that was killed continues to the same jobs."""

import json
import signal
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from stand_in import calls, make_plan, statuses, until

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep import runner, seams
from blockwright.lab.sweep.__main__ import main
from blockwright.registry import ConfigError
from blockwright.training import claims
from blockwright.training.result import Result

ROOT = Path(__file__).resolve().parents[3]


def halving(directory, plan, results):
    """Two jobs of half the best loss, until it is at most 1."""
    values = [value for result in results.values() if (value := result.value("val/loss")) is not None]
    if not values or min(values) <= 1:
        return []
    how, n = "wait" if (directory / "slow").exists() else "ok", len(results)
    overrides = [f"do={how}", f"loss={min(values) / 2}"]
    return [{"job": n + i, "stage": f"round {n // 2}", "overrides": [f"seed={i}", *overrides]} for i in range(2)]


def repeating(directory, plan, results):
    return [{"job": 0, "overrides": []}]


DESIGNS = {"halving": halving, "repeating": repeating}


class Counting:
    """An ending that writes how many jobs have ended, a line each time."""

    def need_packages(self):
        if Path("lacking").exists():
            raise ConfigError("lab", None, "is missing", "Install it")

    def conclude(self, directory, plan, results):
        with (directory / "ended").open("a") as file:
            print(len(plan["jobs"]), sum(result.ended for result in results.values()), file=file)


ENDINGS = {"halving": Counting()}


class Offered(EntryPoint):
    """An entry point whose object is in this file, which no name imports."""

    def load(self):
        return ENDINGS[self.name] if self.group == seams.ENDINGS else DESIGNS[self.name]


def points(group):
    offered = {seams.DESIGNS: DESIGNS, seams.ENDINGS: ENDINGS}.get(group, {})
    return [Offered(name, "unused", group) for name in offered]


OFFERED = f"""
import importlib.util
from blockwright.lab.sweep import seams
sys.path[:0] = [{str(ROOT / "tests" / "lab")!r}, {str(ROOT / "tests")!r}]
spec = importlib.util.spec_from_file_location("growing", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seams.entry_points = module.points
"""
WHOLE = ["loss=4", "loss=3", "loss=1.5", "loss=1.5", "loss=0.75", "loss=0.75"]


@pytest.fixture
def plan(stand_in, tmp_path, monkeypatch):
    """Makes the plan of a sweep; the designs of this file are offered in this process."""
    monkeypatch.setattr(seams, "entry_points", points)
    return lambda *jobs, kind="halving": make_plan(tmp_path / "sweep", *jobs, kind=kind)


@pytest.fixture
def sweep(plan):
    return plan("do=ok loss=4", "do=ok loss=3")


def losses(sweep):
    return [job["overrides"][-1] for job in plans.read(sweep)["jobs"]]


def test_plan_grows_until_its_design_has_no_more(sweep, capsys):
    runner.run_plan(sweep, jobs=range(2))
    assert losses(sweep) == WHOLE[:2]  # killed between jobs
    assert main(["resume", str(sweep)]) == 0
    assert losses(sweep) == WHOLE and statuses(sweep) == ["completed"] * 6
    assert all(len(calls(sweep / str(n))) == 1 for n in range(6))
    assert all((Result.read(sweep / str(n)).wall_seconds or 0) > 0 for n in range(6))
    assert (sweep / "ended").read_text() == "6 6\n"
    assert runner.run_plan(sweep) == 0 and losses(sweep) == WHOLE  # it has ended
    capsys.readouterr()
    main(["status", str(sweep), "--json"])
    stages = [job["stage"] for job in json.loads(capsys.readouterr().out)["jobs"]]
    assert stages[2:] == ["round 1", "round 1", "round 2", "round 2"]


def test_sweep_killed_in_a_grown_job_stays_locked_and_resumes_to_the_same_jobs(sweep, run_apart):
    (sweep / "slow").touch()
    process = run_apart(sweep, OFFERED)
    until(lambda: (sweep / "2" / "waits").exists() and (sweep / "3" / "waits").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert losses(sweep) == WHOLE[:4]
    with pytest.raises(ConfigError, match="still running"):  # its jobs have outlived it
        main(["resume", str(sweep)])
    (sweep / "go").touch()
    until(lambda: not claims.is_taken(sweep))
    assert main(["resume", str(sweep)]) == 0
    assert losses(sweep) == WHOLE and statuses(sweep) == ["completed"] * 6
    assert (sweep / "ended").read_text() == "6 6\n"


def test_stopped_sweep_does_not_grow(plan, run_apart):
    process = run_apart(sweep := plan("do=ok loss=4", "do=wait loss=3"), OFFERED)
    until(lambda: (sweep / "1" / "waits").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75 and len(losses(sweep)) == 2 and not (sweep / "ended").exists()


def test_sweep_whose_every_job_is_lost_is_not_concluded(plan):
    assert runner.run_plan(sweep := plan("do=crash")) == 1 and not (sweep / "ended").exists()


def test_sweep_that_could_not_be_concluded_is_refused_before_its_jobs(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacking").touch()
    for action in ("resume", "retry"):
        with pytest.raises(ConfigError, match="Install it"):
            main([action, str(sweep)])
    assert not (sweep / "0").exists()


@pytest.mark.slow
def test_failed_jobs_have_ended_and_retried_ones_alone_do_not_grow_it(plan):
    sweep = plan("do=crash", "do=ok loss=2")
    assert runner.run_plan(sweep, jobs=[0]) == 0 and len(losses(sweep)) == 2
    assert main(["retry", str(sweep), "--jobs", "0"]) == 0 and len(losses(sweep)) == 2
    assert runner.run_plan(sweep) == 0 and losses(sweep)[2:] == ["loss=1.0", "loss=1.0"]


def test_design_with_jobs_that_no_plan_can_have_is_refused(plan):
    sweep = plan("do=ok loss=4", kind="repeating")
    with pytest.raises(ConfigError, match="two of its jobs have one number"):
        runner.run_plan(sweep)
    assert len(losses(sweep)) == 1
