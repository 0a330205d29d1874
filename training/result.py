"""How a run ended: ways to end early, by request or by divergence, with their exit codes, and ``results.json``.

The file is read and written here only. Nothing here imports Lightning, so that refusals stay fast.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from blockwright.registry import REFUSED, ConfigError
from blockwright.registry.folder import read_json, write_json
from blockwright.training.figure import Figure, read_records

PREEMPTED = 75  # stopped by request: the same command may be tried again (EX_TEMPFAIL of sysexits.h)
DIVERGED = 70  # diverged: the same command would diverge again (EX_SOFTWARE)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # each asks a run to stop


class Interrupted(BaseException):
    """A run stopped on request, its checkpoint written. Not an ``Exception``, so that no handler swallows it.

    Args:
        checkpoint: to continue from; None when training had not begun
        step: optimizer steps done
        signum: the signal that asked for it
        sweep: the folder of the sweep that is stopped with it; None for a run alone
    """

    def __init__(self, checkpoint: Path | None, step: int, signum: int, sweep: Path | None = None) -> None:
        self.checkpoint, self.step, self.signum, self.sweep = checkpoint, step, signum, sweep
        when = f"after step {step}" if checkpoint else "outside of training"
        super().__init__(f"stopped by {signal.Signals(signum).name} {when}")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Path | None, int, int, Path | None]]:
        return type(self), (self.checkpoint, self.step, self.signum, self.sweep)  # pickled by a launcher's worker


class Diverged(Exception):  # noqa: N818 - an outcome
    """Training was given up; its checkpoints are unchanged.

    Args:
        step: optimizer steps done
        reason: what was observed
    """

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(f"diverged at step {step}: {reason}")


class Pruned(Exception):  # noqa: N818 - an outcome
    """A trial of a search was stopped early because others did better.

    Args:
        step: optimizer steps done
        monitor: name of the figure
        value: its last value
    """

    def __init__(self, step: int, monitor: str, value: float) -> None:
        self.step, self.monitor, self.value = step, monitor, value
        super().__init__(f"pruned at step {step}: {monitor} {value:.4f}")


def refuse(error: ConfigError) -> NoReturn:
    """End the program with the message of a refusal. No handler of a program in between, such as Hydra's, sees it."""
    print(error.render(), file=sys.stderr)
    raise SystemExit(REFUSED) from None


@contextmanager
def stoppable() -> Iterator[None]:
    """Context in which a signal stops at once, while data are built or a model is evaluated: there is nothing to save.

    Training replaces these handlers by its own, which finish the step. After ``Interrupted`` the process has only its
    exit code left to give, and a later signal must not change it: a cluster that has seen one rank of a run stop sends
    SIGTERM to the others, which may be stopping already. Ctrl-C still ends the process.

    Raises:
        Interrupted
    """
    before = {signum: signal.signal(signum, stop_at_once) for signum in SIGNALS}
    try:
        yield
    finally:
        stopping = isinstance(sys.exception(), Interrupted)
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if stopping and signum != signal.SIGINT else handler)


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    """A signal handler for when there is nothing to save.

    A run that is stopping already still names its checkpoint: Slurm sends SIGTERM after the signal by which a job was
    queued again. Ctrl-C ends it at once.

    Raises:
        Interrupted
    """
    if isinstance(sys.exception(), Interrupted) and signum != signal.SIGINT:
        return
    raise Interrupted(None, 0, signum)


RESULTS = "results.json"  # in the folder of a run
UNFINISHED = "unfinished"
UNREADABLE = "unreadable"
LOST = ("failed", "diverged")
SECONDS = ("save_seconds", "fit_seconds", "wall_seconds")
NUMBERS = ("parameters", "active_parameters", "steps", *SECONDS, "code", "retried_as")


@dataclass(frozen=True)
class Result:
    """How a run ended, and its figures.

    Args:
        status: ``completed``, ``failed``, ``diverged`` or ``pruned``; ``unfinished`` or ``unreadable`` without a result
        parameters, active_parameters: of the model
        steps: of the optimizer
        save_seconds: of the slowest checkpoint
        fit_seconds: of training
        wall_seconds: of the process, its start included, as the sweep measured its last attempt
        metrics: logged name → final value, NaN and infinity included
        figures: logged name → its unit and direction
        code: exit code of a pod
        reason: why it ended early; else empty
        retried_as: number of the job that a search ran in its place
    """

    status: str
    parameters: float | None = None
    active_parameters: float | None = None
    steps: float | None = None
    save_seconds: float | None = None
    fit_seconds: float | None = None
    wall_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    code: float | None = None
    reason: str = ""
    retried_as: float | None = None

    @property
    def ended(self) -> bool:
        """True for a run that has written its result."""
        return self.status not in (UNFINISHED, UNREADABLE)

    @property
    def lost(self) -> bool:
        """True for a run that failed or diverged."""
        return self.status in LOST

    def value(self, metric: str) -> float | None:
        """The finite final value of a metric; None without one, or if the run did not complete."""
        value = self.metrics.get(metric) if self.status == "completed" else None
        return float(value) if value is not None and math.isfinite(value) else None

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read the result in the folder of a run, which may be damaged or untrusted.

        The status is ``unfinished`` without a file, and ``unreadable`` for half a file.
        """
        if not (folder / RESULTS).exists():
            return cls(UNFINISHED, reason=f"no {RESULTS}: it is still running, or was stopped")
        try:
            return cls.of(read_json(folder, RESULTS))
        except ConfigError:
            return cls.of(None)

    @classmethod
    def of(cls, plain: Any) -> Result:
        """A result from plain types, of which unexpected values are left out."""
        if not isinstance(plain, Mapping) or not isinstance(plain.get("status"), str):
            return cls(UNREADABLE, reason=f"its {RESULTS} cannot be read")
        metrics, reason = plain.get("metrics"), plain.get("reason")
        return cls(
            plain["status"],
            metrics=_numbers(metrics) if isinstance(metrics, Mapping) else {},
            figures=read_records(plain),
            reason=reason if isinstance(reason, str) else "",
            **_numbers({name: plain.get(name) for name in NUMBERS}),
        )

    def to_plain(self) -> dict[str, Any]:
        """The contents of the file: every value that is known."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["figures"] = {name: figure.to_plain() for name, figure in self.figures.items()}
        wanted = ("metrics",) if self.status == "completed" else ()
        return {name: value for name, value in plain.items() if name in wanted or value not in (None, "", {})}

    def write(self, folder: Path) -> None:
        """Write it to the folder of a run, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS, self.to_plain())


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among values: NaN and infinity are, an integer that no float can hold is not."""
    return {name: value for name, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (whole and abs(value) <= sys.float_info.max)


def record_failure(
    folder: Path, reason: str, status: str = "failed", metrics: Mapping[str, float] | None = None
) -> None:
    """Write the result of a run that ended early, beside the figures that it had.

    Args:
        folder: of the run
        reason: human-readable
        status: ``failed``, ``diverged`` or ``pruned``
        metrics: figures to add
    """
    result = Result.read(folder)
    replace(result, status=status, reason=reason, metrics={**result.metrics, **(metrics or {})}).write(folder)
