"""Ways in which a run ends early, by request or by divergence, and their exit codes.

Free of Lightning imports, so that refusals stay fast.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from blockwright.registry import REFUSED, ConfigError

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
