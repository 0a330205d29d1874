"""``blockwright sweep status|resume|retry DIR``: show, resume or retry a sweep."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.sweep import locks
from lab.sweep import plan as plans
from lab.sweep.callback import SWEEPER
from lab.sweep.runner import check_can_run, run_plan
from lab.sweep.study import FILE as STUDY
from lab.sweep.table import best_of, rows_of, table_of
from registry import ConfigError, did_you_mean
from registry.command import Parser, run_command
from registry.printing import show as print_table
from training import jobs as training_jobs
from training.checkpoints.places import FOLDER
from training.configuration.overrides import quoted
from training.jobs import RESULTS, results_of
from training.writing import write_json

ACTIONS = ("status", "resume", "retry")
BAD = ("failed", "diverged")
PREVIOUS = "results.previous.json"  # of a job's previous attempt


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ConfigError: no such action, no sweep, a running sweep, or no such jobs
    """
    parser = Parser(prog="blockwright sweep", description=__doc__)
    parser.add_argument("action", help="status: a table; resume: run what is unfinished; retry: and what failed")
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of a sweep or an ablation")
    parser.add_argument("--json", action="store_true", help="status for programs")
    parser.add_argument("--jobs", default=None, metavar="N,N", help="retry these only")
    parser.add_argument("--workers", type=int, default=None, help="jobs at a time; default: as the sweep began")
    given = parser.parse_args(arguments)
    if given.action not in ACTIONS:
        raise ConfigError("command line", given.action, "is not an action", did_you_mean(given.action, ACTIONS))
    for flag, value, action in (("--jobs", given.jobs, "retry"), ("--json", given.json or None, "status")):
        if value is not None and given.action != action:
            raise ConfigError("command line", flag, f"is an option of {action}", f"Leave it out, or write {action}")
    sweep = given.dir.resolve()
    plan = plans.read(sweep)
    if given.action == "status":
        show(sweep, plan, given.json)
        return 0
    check_can_run(sweep, plan, given.workers if given.workers is not None else plan.get("workers") or 1)
    os.close(locks.take_sweep(sweep))  # refuses a running sweep before anything changes
    if plan["kind"] == "search":
        return go_on_with_search(sweep, plan, given.action == "retry", _numbers(given.jobs), given.workers)
    if given.action == "resume":
        return run_plan(sweep, given.workers)
    chosen = to_retry(rows_of(sweep), _numbers(given.jobs))
    for job in chosen:
        folder = sweep / str(job)
        if (results_of(folder) or {}).get("status") == "diverged":
            kept = set_aside(folder)
            print(
                f"job {job} diverged: it restarts from scratch, since from its checkpoint it would diverge again{kept}"
            )
        if (results := folder / RESULTS).exists():
            results.replace(results.with_name(PREVIOUS))
    return run_plan(sweep, given.workers, jobs=chosen if given.jobs else None)


def set_aside(job: Path) -> str:
    """Move the checkpoints of a diverged job out of the way of its next attempt.

    Returns:
        where they are, as a clause; empty if there are none
    """
    usual = job / FOLDER
    if not usual.exists():
        return ""
    kept = usual.resolve().with_name(f"{usual.resolve().name}.diverged.{time.time_ns()}")  # unlike earlier ones
    usual.resolve().rename(kept)
    if usual.is_symlink():
        usual.unlink()
    return f" (kept: {kept})"


def show(sweep: Path, plan: Mapping[str, Any], as_json: bool) -> None:
    """Print the table of a sweep and the number of jobs by status, or both as JSON."""
    rows, best = rows_of(sweep), best_of(sweep, plan)
    counts = Counter(row["status"] for row in rows)
    running = locks.is_taken(sweep) or "running" in counts
    if "jobs" not in plan and (left := (plan.get("n_trials") or 0) - len(rows)) > 0:
        counts["waiting" if running else "not begun"] += left
    if as_json:
        head = {key: plan.get(key) for key in ("kind", "name", "metric", "direction", "command")}
        found = None if best is None else {"job": best[0], "value": best[1]}
        document = {"directory": str(sweep), **head, "running": running, "counts": counts, "best": found, "jobs": rows}
        print(json.dumps(_finite(document), indent=1))
        return
    if rows:
        print_table(table_of(rows, f"{plan['kind']} {plan.get('name', '')}: {sweep}"))
    line = ", ".join(f"{number} {status}" for status, number in counts.items()) or "no job has begun"
    print(f"{'running' if running else 'not running'}: {line}")
    if best is not None:
        print(f"best {plan['metric']}: {best[1]:.4f} (job {best[0]})")


def _finite(value: Any) -> Any:
    """NaN and infinity as null, since JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    bad = [row["job"] for row in rows if row["status"] in BAD]
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
    dropped = ("hydra.sweep.dir=", "hydra.sweeper.n_trials=")
    argv = [a for a in plan["argv"] if not a.lstrip("+").startswith(dropped)]
    more = [f"hydra.sweep.dir={quoted(sweep)}", "hydra.mode=MULTIRUN"]
    more += [f"hydra.sweeper.n_trials={plan['n_trials']}"]
    os.chdir(plan["cwd"])
    sys.stdout.flush()
    environment = {**os.environ, plans.RESUMED: str(sweep)}
    os.execve(sys.executable, [sys.executable, str(training_jobs.TRAIN), *argv, *more], environment)


def ask_again(sweep: Path, plan: dict[str, Any], jobs: Sequence[int] | None) -> None:
    """Enqueue new trials with the parameters of those that failed: a study cannot change a finished trial."""
    from lab.sweep.study import open_study

    chosen = [job for job in to_retry(rows_of(sweep), jobs) if _is_bad(sweep / str(job))]
    study = open_study(sweep, plan)
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for job in chosen:
        study.enqueue_trial(trials[job].params)
        results = results_of(sweep / str(job)) or {}
        again = max(trial.number for trial in study.get_trials(deepcopy=False))
        row = {**results, "retried_as": again, "reason": f"{results.get('reason', '')}; retried as job {again}"}
        plan["n_trials"] += 1
        plans.write(sweep, plan)
        write_json(sweep / str(job) / RESULTS, row)


def _is_bad(job: Path) -> bool:
    results = results_of(job)
    return results is not None and results["status"] in BAD and "retried_as" not in results


if __name__ == "__main__":
    sys.exit(run_command(main))
