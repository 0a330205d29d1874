"""``blockwright sweep status|resume|retry|stop|job DIR``: show, resume, retry or stop a sweep, or run a job of it.

If the jobs of a sweep run on a host, such as a cluster, they are asked for there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockwright.lab.sweep import launcher, seams
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.callback import SWEEPER
from blockwright.lab.sweep.job import run_job, set_aside
from blockwright.lab.sweep.runner import check_can_run, resume_command, run_plan
from blockwright.lab.sweep.study import FILE as STUDY
from blockwright.lab.sweep.table import best_of, rows_of, table_of
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import Parser, quoted, run_command, strict_json
from blockwright.registry.printing import show as print_table
from blockwright.training import claims
from blockwright.training import jobs as training_jobs
from blockwright.training.result import LOST, Result

ACTIONS = ("status", "resume", "retry", "stop", "job")


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ConfigError: no such action, no sweep, a running sweep, or no such jobs
    """
    arguments, overrides = _split(arguments)
    parser = Parser(prog="blockwright sweep", description=__doc__)
    about = "status: a table; resume: run what is unfinished; retry: and what failed; stop: save and end; job: run one"
    parser.add_argument("action", help=about)
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of a sweep or an ablation")
    parser.add_argument("job", metavar="N", type=int, nargs="?", help="of job: its number; then -- OVERRIDE …")
    parser.add_argument("--json", action="store_true", help="status for programs")
    parser.add_argument("--jobs", default=None, metavar="N,N", help="retry these only")
    parser.add_argument("--workers", type=int, default=None, help="jobs at a time; default: as the sweep began")
    given = parser.parse_args(arguments)
    if given.action not in ACTIONS:
        raise ConfigError("command line", given.action, "is not an action", did_you_mean(given.action, ACTIONS))
    single = (("--jobs", given.jobs, "retry"), ("--json", given.json or None, "status"), ("N", given.job, "job"))
    for flag, value, action in (*single, ("--", overrides, "job")):
        if value is not None and given.action != action:
            raise ConfigError("command line", flag, f"is an option of {action}", f"Leave it out, or write {action}")
    if given.workers is not None and given.action not in ("resume", "retry"):
        rule = "is how many jobs resume and retry run at a time"
        raise ConfigError("--workers", given.workers, rule, "Leave it out, or write resume or retry")
    sweep = given.dir.resolve()
    if given.action == "job":
        if given.job is None:
            raise ConfigError("command line", "job", "runs one job", "Write its number: blockwright sweep job DIR N")
        return run_job(sweep, given.job, overrides)
    plan = plans.read(sweep)
    if given.action == "status":
        show(sweep, plan, given.json)
        return 0
    if given.action == "stop":
        return stop(sweep, plan)
    check_can_run(sweep, plan, given.workers if given.workers is not None else plan.get("workers") or 1)
    os.close(claims.take_sweep(sweep))  # refuses a running sweep before anything changes
    if plan["kind"] == "search":
        return go_on_with_search(sweep, plan, given.action == "retry", _numbers(given.jobs), given.workers)
    if given.workers is not None and (launcher.KEY in plan or seams.is_hosted(plan)):
        rule = "is of processes of this command, which starts no job of this sweep"
        raise ConfigError("--workers", given.workers, rule, "Leave it out: a sweep keeps the options of its launcher")
    chosen = make_way(sweep, plan, _numbers(given.jobs)) if given.action == "retry" else []
    if seams.is_hosted(plan) and launcher.KEY not in plan:
        return _again(sweep, plan, [])
    return run_plan(sweep, given.workers, jobs=chosen if given.jobs else None)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str] | None]:
    """Arguments before and after ``--``; None without one."""
    if "--" not in arguments:
        return arguments, None
    at = list(arguments).index("--")
    return arguments[:at], arguments[at + 1 :]


def make_way(sweep: Path, plan: Mapping[str, Any], jobs: Sequence[int] | None) -> list[int]:
    """Choose the jobs to retry, set their results aside, and delete them from their host, if they have one."""
    if (hosted := seams.jobs_of(sweep, plan)) is not None:
        hosted.collect()
    chosen = to_retry(rows_of(sweep), jobs)
    for job in chosen:
        result = Result.read(sweep / str(job))
        kept = set_aside(sweep / str(job), result)
        if result.status == "diverged":
            again = "it restarts from scratch, since from its checkpoint it would diverge again"
            print(f"job {job} diverged: {again}{kept}")
    if hosted is not None:
        hosted.stop(chosen)
    return chosen


def stop(sweep: Path, plan: Mapping[str, Any]) -> int:
    """Ask the jobs of a sweep to save and end, on its host or on this machine."""
    if (hosted := seams.jobs_of(sweep, plan)) is not None:
        (sweep / training_jobs.STOP).touch()  # a launcher that watches starts none again
        ran, waiting = hosted.stop()
        said = f"{len(ran)} jobs have saved and ended" + (f", {len(waiting)} had not started" if waiting else "")
        print(f"{said}. Resume with: {resume_command(sweep)}")
        return 0
    holders = {claims.holder(folder) for folder in (sweep, *(p for p in sweep.iterdir() if p.name.isdigit()))} - {None}
    if not holders:
        print("no job is running on this machine")
    for process in holders:
        os.kill(process, signal.SIGTERM)  # type: ignore[arg-type]
    return 0


def show(sweep: Path, plan: Mapping[str, Any], as_json: bool) -> None:
    """Print the table of a sweep and the number of jobs by status, or both as JSON."""
    hosted = seams.jobs_of(sweep, plan)
    states = None if hosted is None else hosted.collect()
    rows, best = rows_of(sweep, states), best_of(sweep, plan)
    counts = Counter(row["status"] for row in rows)
    running = claims.is_taken(sweep) or "running" in counts
    if "jobs" not in plan and (left := (plan.get("n_trials") or 0) - len(rows)) > 0:
        counts["waiting" if running else "not begun"] += left
    if as_json:
        head = {key: plan.get(key) for key in ("kind", "name", "metric", "direction", "command")}
        found = None if best is None else {"job": best[0], "value": best[1]}
        document = {"directory": str(sweep), **head, "running": running, "counts": counts, "best": found, "jobs": rows}
        print(strict_json(document))
        return
    if rows:
        print_table(table_of(rows, f"{plan['kind']} {plan.get('name', '')}: {sweep}", best))
    for stage in filter(None, dict.fromkeys(row["stage"] for row in rows)):
        ended = [row["status"] in ("completed", "pruned", *LOST) for row in rows if row["stage"] == stage]
        print(f"stage {stage}: {sum(ended)} of {len(ended)} jobs have ended")
    line = ", ".join(f"{number} {status}" for status, number in counts.items()) or "no job has begun"
    print(f"{'running' if running else 'not running'}: {line}")
    if best is not None:
        better = "more" if plan["direction"] == "maximize" else "less"
        print(f"best {plan['metric']}: {best[1]:.4f} (job {best[0]}); {better} is better")


def _numbers(jobs: str | None) -> list[int] | None:
    if jobs is None:
        return None
    try:
        return [int(number) for number in jobs.split(",")]
    except ValueError:
        raise ConfigError("--jobs", jobs, "must be a list of job numbers", "Write --jobs 3,5") from None


def to_retry(rows: Sequence[Mapping[str, Any]], jobs: Sequence[int] | None) -> list[int]:
    """Numbers of the jobs to retry: all that failed or diverged, or the given ones.

    Raises:
        ConfigError: a given job does not exist, or did not fail
    """
    bad = [row["job"] for row in rows if row["status"] in LOST]
    if jobs is None:
        return bad
    status = {row["job"]: row["status"] for row in rows}
    for job in jobs:
        if job not in status:
            raise ConfigError("--jobs", job, "there is no such job", f"Jobs: 0 to {len(rows) - 1}")
        if status[job] in ("completed", "pruned"):
            known = ", ".join(map(str, bad)) or "none"
            raise ConfigError("--jobs", job, f"is {status[job]}", f"Jobs that failed or diverged: {known}")
    return list(jobs)


def go_on_with_search(
    sweep: Path, plan: dict[str, Any], retry: bool, jobs: Sequence[int] | None, workers: int | None
) -> int:
    """Replace this process by the search, resumed.

    Raises:
        ConfigError: a sweeper that cannot resume, a missing study, or ``--workers``, which the launcher sets
    """
    if plan.get("sweeper") != SWEEPER:
        rule = f"was made by {plan.get('sweeper')}, which cannot resume"
        raise ConfigError("DIR", str(sweep), rule, "Only grids and searches by hydra/sweeper=optuna can be resumed")
    if workers is not None:
        remedy = "Leave it out: a search keeps the number it started with"
        raise ConfigError("--workers", workers, "the launcher sets the parallel jobs of a search", remedy)
    if lacking := [key for key in ("study", "argv", "cwd", "n_trials") if not plan.get(key) and plan.get(key) != []]:
        rule = f"lacks {', '.join(lacking)}"
        raise ConfigError(str(sweep / plans.PLAN), "…", rule, "Start a new search in another folder")
    if not plan["study"].get("storage") and rows_of(sweep) and not (sweep / STUDY).exists():
        rule = "is missing, and the search cannot resume without it; the trials' runs are still in their folders"
        raise ConfigError(str(sweep / STUDY), None, rule, "Restore it, or start a new search in another folder")
    if retry:
        ask_again(sweep, plan, jobs)
    return _again(sweep, plan, [f"hydra.sweeper.n_trials={plan['n_trials']}"])


def _again(sweep: Path, plan: Mapping[str, Any], more: Sequence[str]) -> int:
    """Replace this process by the command of a multirun, resumed."""
    dropped = ("hydra.sweep.dir=", "hydra.sweeper.n_trials=")
    argv = [a for a in plan["argv"] if not a.lstrip("+").startswith(dropped)]
    more = [f"hydra.sweep.dir={quoted(sweep)}", "hydra.mode=MULTIRUN", *more]
    os.chdir(plan["cwd"])
    sys.stdout.flush()
    environment = {**os.environ, plans.RESUMED: str(sweep)}
    os.execve(sys.executable, [sys.executable, *training_jobs.TRAIN, *argv, *more], environment)


def ask_again(sweep: Path, plan: dict[str, Any], jobs: Sequence[int] | None) -> None:
    """Enqueue new trials with the parameters of those that failed: a study cannot change a finished trial."""
    from blockwright.lab.sweep.study import open_study

    chosen = [job for job in to_retry(rows_of(sweep), jobs) if _can_retry(sweep / str(job))]
    study = open_study(sweep, plan)
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for job in chosen:
        study.enqueue_trial(trials[job].params)
        result = Result.read(sweep / str(job))
        again = max(trial.number for trial in study.get_trials(deepcopy=False))
        retried = replace(result, retried_as=again, reason=f"{result.reason}; retried as job {again}")
        plan["n_trials"] += 1
        plans.write(sweep, plan)
        retried.write(sweep / str(job))


def _can_retry(job: Path) -> bool:
    result = Result.read(job)
    return result.lost and result.retried_as is None


if __name__ == "__main__":
    sys.exit(run_command(main))
