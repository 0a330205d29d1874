"""Progress of a sweep from its jobs' files: done, failed, the best so far, and the estimated time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from blockwright.lab.sweep.table import best_of
from blockwright.training.result import RESULTS, Result


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
