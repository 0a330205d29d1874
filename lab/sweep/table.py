"""A sweep so far: the table of all jobs with overrides and final figures, failures included, and its progress."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from blockwright.lab.sweep.plan import PLAN, name_of, overrides_of, read
from blockwright.registry import ConfigError
from blockwright.registry.folder import write_text
from blockwright.registry.printing import show
from blockwright.training.claims import is_taken
from blockwright.training.figure import Figure, better_of
from blockwright.training.result import LOST, RESULTS, UNFINISHED, Result

# --- which way the figure of a sweep is better, by its plan and by what its runs say of their figures -----------------


def maximizes(path: str, metric: str, described: Figure | None, *asked: tuple[str, Any]) -> bool:
    """Whether more of a figure is better.

    Args:
        path: where it is named
        metric: its name
        described: by the runs; None if by none of them
        asked: what else says the direction, by path: a plan, the command line

    Raises:
        ConfigError: nothing says it, neither is better, or they contradict each other
    """
    return better_of(path, metric, described, *asked) == "more"


def described(results: Iterable[Result], where: str) -> dict[str, Figure]:
    """The figures that runs describe: logged name → its unit and direction.

    Args:
        results: of runs of one sweep
        where: their folder

    Raises:
        ConfigError: two runs describe one figure differently
    """
    found: dict[str, Figure] = {}
    for each in results:
        for name, figure in each.figures.items():
            if (known := found.setdefault(name, figure)).better != figure.better:
                rule = f"holds runs that disagree on {name}: {_way(known)} is better, and {_way(figure)} is"
                raise ConfigError("DIR", where, rule, "Restore its results.json, or leave out the run that was changed")
    return found


def _way(figure: Figure) -> str:
    return figure.better or "neither"


LEFT = {"status": UNFINISHED}
FIGURES = ("val/loss", "val/bits_per_byte", "test/loss", "speed/tokens_per_second")


def rows_of(sweep: Path, states: Mapping[int, Mapping[str, str]] | None = None) -> list[dict[str, Any]]:
    """A row per job, planned or started: number, stage and name in an ablation, status, own overrides, figures, reason.

    Args:
        sweep: its folder
        states: status and reason of jobs without results, as their host knows them; None for jobs of this machine

    The status of a job is ``completed``, ``pruned``, ``failed``, ``diverged``, ``running``, ``waiting`` (not yet
    started) or ``unfinished``.
    """
    plan = _plan(sweep)
    jobs = {job["job"]: job for job in plan.get("jobs", [])}
    planned = {number: job["overrides"] for number, job in jobs.items()}
    begun = {int(p.name) for p in sweep.iterdir() if p.name.isdigit()} if sweep.is_dir() else set()
    given = {job: planned.get(job) or overrides_of(sweep / str(job)) for job in sorted(begun | set(planned))}
    common = set.intersection(*(set(o) for o in given.values())) if len(given) > 1 else set()
    live = is_taken(sweep)
    rows = []
    for job, overrides in given.items():
        if not (result := Result.read(sweep / str(job))).ended:
            result = _at_work(sweep / str(job), live) if states is None else Result.of(states.get(job, LEFT))
        one = jobs.get(job, {})
        row: dict[str, Any] = {"job": job, "stage": one.get("stage", ""), "name": name_of(one), "status": result.status}
        row["overrides"] = " ".join(o for o in overrides if o not in common)
        row |= {"parameters": result.parameters, "active_parameters": result.active_parameters}
        row |= {name: result.metrics.get(name) for name in (*FIGURES, plan.get("metric", FIGURES[0]))}
        row["reason"] = result.reason
        rows.append(row)
    return rows


def exit_code(rows: Sequence[Mapping[str, Any]]) -> int:
    """Of a sweep's table: 1 if every job has failed or diverged, for scripts that continue with its results."""
    return int(bool(rows) and all(row["status"] in LOST for row in rows))


def summarise(sweep: Path) -> list[dict[str, Any]]:
    """Read the jobs of a sweep, print them as a table, and write ``summary.csv``.

    Returns:
        the rows, as from ``rows_of``
    """
    rows = rows_of(sweep)
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_text(sweep / "summary.csv", text.getvalue())
        show(table_of(rows, f"{len(rows)} jobs: {sweep}/summary.csv", best_of(sweep, _plan(sweep))))
    return rows


def best_of(sweep: Path, plan: Mapping[str, Any]) -> tuple[int, float] | None:
    """The job of a sweep with the best finite value of its metric, or val/loss without a plan, and that value.

    Raises:
        ConfigError: the plan and the runs contradict each other
    """
    metric = plan.get("metric", FIGURES[0])
    jobs = sorted(int(p.name) for p in sweep.iterdir() if p.name.isdigit())  # of a tie the first
    results = {job: Result.read(sweep / str(job)) for job in jobs}
    values = {job: value for job, result in results.items() if (value := result.value(metric)) is not None}
    figure = described((results[job] for job in values), str(sweep)).get(metric)
    if not values or (figure is None and "direction" not in plan):
        return None
    asked = (f"direction of {sweep / PLAN}", plan.get("direction"))
    most = maximizes(f"metric of {sweep / PLAN}", metric, figure, asked)
    return (max if most else min)(values.items(), key=lambda each: each[1])


def _plan(sweep: Path) -> dict[str, Any]:
    return read(sweep) if (sweep / PLAN).exists() else {}


def _at_work(job: Path, live: bool) -> Result:
    """The state of a job of this machine that has no result."""
    if not job.is_dir():
        return Result("waiting") if live else Result(UNFINISHED, reason="not begun")
    if is_taken(job):
        return Result("running")
    stopped = (job / "checkpoints" / "last.ckpt").exists()
    return Result(UNFINISHED, reason="stopped, with a checkpoint" if stopped else f"no {RESULTS}")


def table_of(rows: list[dict[str, Any]], title: str, best: tuple[int, float] | None) -> Table:
    """A table of 80 columns: what differs between jobs, and the results, the best job's in bold; reasons of failures
    are below.

    Overrides, reasons and paths are Text, so that rich does not read ``trainer=[fsdp,sim]`` as markup.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column("job", justify="right")
    named = all(row.get("name") for row in rows)
    table.add_column("arm" if named else "overrides", overflow="fold")
    further = [name for name in rows[0] if "/" in name and name not in FIGURES] if rows else []  # what is compared
    for name in ("val loss", "bits/byte", "active", "tokens/s", *further):
        table.add_column(name, justify="right", no_wrap=name not in further, overflow="fold")
    for row in rows:
        overrides = Text(row["name"] if named else row["overrides"].replace(" ", "\n"))
        if row["status"] != "completed":
            style = "red" if row["status"] in (*LOST, UNFINISHED) else "dim"
            table.add_row(str(row["job"]), overrides, row["status"], style=style)
            continue
        figures = ("val/loss", "val/bits_per_byte", "active_parameters", "speed/tokens_per_second", *further)
        formats = (".4f", ".4f", "short", ",.0f", *[".4g"] * len(further))
        cells = [_cell(row[name], how) for name, how in zip(figures, formats, strict=True)]
        is_best = best is not None and row["job"] == best[0]
        table.add_row(str(row["job"]), overrides, *cells, style="bold green" if is_best else "")
    failed = [f"job {row['job']}: {row['reason']}" for row in rows if row["status"] != "completed" and row["reason"]]
    table.caption = Text("\n".join(failed)) if failed else None
    table.caption_justify = "left"
    return table


def _cell(value: float | int | None, how: str) -> str:
    if value is None:
        return ""
    if how != "short":
        return format(value, how)
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f}{suffix}"
    return str(value)


@dataclass(frozen=True)
class Count:
    """Number of ended jobs of a sweep.

    Args:
        done: with figures, or pruned
        failed: failed or diverged
        total: all jobs; None if unknown
        seconds: mean duration of a job; None before the first has ended
    """

    done: int
    failed: int
    total: int | None
    seconds: float | None

    def left(self, workers: int) -> float | None:
        """Estimated seconds until all have ended."""
        if self.total is None or self.seconds is None:
            return None
        return self.seconds * math.ceil((self.total - self.done - self.failed) / max(workers, 1))


def count(sweep: Path, plan: Mapping[str, Any]) -> Count:
    """Count all jobs of a sweep."""
    ended = [(p, r) for p in sweep.iterdir() if p.name.isdigit() and (r := Result.read(p)).ended]
    failed = sum(result.lost for _, result in ended)
    took = [seconds for job, _ in ended if (seconds := seconds_of(job)) is not None]
    total = len(plan["jobs"]) if "jobs" in plan else plan.get("n_trials")
    return Count(len(ended) - failed, failed, total, sum(took) / len(took) if took else None)


def seconds_of(job: Path) -> float | None:
    """Time between the start of a job's last attempt and its results."""
    try:
        begun = (job / ".hydra" / "overrides.yaml").stat().st_mtime
        return max(0.0, (job / RESULTS).stat().st_mtime - begun)
    except OSError:
        return None


def ended_line(sweep: Path, plan: Mapping[str, Any], job: int, workers: int) -> str:
    """One line on a job that has just ended, and on the sweep."""
    counted, result = count(sweep, plan), Result.read(sweep / str(job))
    value = result.metrics.get(plan["metric"])
    status = "done" if result.status == "completed" else result.status if result.ended else "unfinished"
    figure = f"logged no {plan['metric']}" if value is None else f"{plan['metric']} {value:.4f}"
    outcome = figure if status == "done" else result.reason if result.ended else ""
    ended = f"{counted.done + counted.failed}{f'/{counted.total}' if counted.total else ''} ended"
    parts = [f"job {job} {status}: {outcome}" if outcome else f"job {job} {status}", ended]
    if (best := best_of(sweep, plan)) is not None:
        parts.append(f"best {best[1]:.4f} (job {best[0]})")
    left = counted.left(workers)
    if left:
        parts.append(f"about {duration(left)} left")
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """A rounded duration: 40 s, 6 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Display:
    """A live view in a terminal; elsewhere, a line for each job that starts or ends.

    Args:
        sweep: its folder
        plan: its plan
        workers: parallel jobs
    """

    def __init__(self, sweep: Path, plan: Mapping[str, Any], workers: int) -> None:
        self.sweep, self.plan, self.workers = sweep, plan, workers
        self.console = Console()
        self._live = (
            Live(console=self.console, transient=True, auto_refresh=False) if self.console.is_terminal else None
        )
        self._shown = 0.0

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a permanent line."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def ended(self, job: int) -> None:
        """Report a job that has ended."""
        self.say(ended_line(self.sweep, self.plan, job, self.workers))

    def refresh(self, running: Sequence[tuple[int, str, float]]) -> None:
        """Update the live view, once a second.

        Args:
            running: number, overrides and time.monotonic() of the start of each
        """
        if self._live is None or time.monotonic() - self._shown < 1:
            return
        self._shown = time.monotonic()
        counted, best = count(self.sweep, self.plan), best_of(self.sweep, self.plan)
        left = counted.left(self.workers)
        head = f"{counted.done} done, {counted.failed} failed, {len(running)} running of {counted.total}"
        head += f"; best {self.plan['metric']} {best[1]:.4f} (job {best[0]})" if best else ""
        head += f"; about {duration(left)} left" if left else ""
        lines = [f"  job {job}  {duration(self._shown - since):>7}  {overrides}" for job, overrides, since in running]
        rows = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        self._live.update(Group(Text(head, style="bold"), *rows), refresh=True)
