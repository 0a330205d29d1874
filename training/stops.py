"""How a run may end other than by being done: by request, or because it diverged. And what the shell is told.

Kept free of Lightning: a refusal must not wait for it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PREEMPTED = 75  # stopped by request: the same command may be tried again (EX_TEMPFAIL of sysexits.h)
DIVERGED = 70  # the numbers went bad: the same command would end there again (EX_SOFTWARE)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # each asks a run to stop


class Interrupted(BaseException):
    """A run stopped on request, its checkpoint written. No error: nobody's ``except Exception`` may swallow it.

    Args:
        checkpoint: to continue from; None when training had not begun
        step: optimizer steps done
        signum: the signal that asked for it
    """

    def __init__(self, checkpoint: Path | None, step: int, signum: int) -> None:
        self.checkpoint, self.step, self.signum = checkpoint, step, signum
        when = f"after step {step}" if checkpoint else "outside of training"
        super().__init__(f"stopped by {signal.Signals(signum).name} {when}")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Path | None, int, int]]:
        return type(self), (self.checkpoint, self.step, self.signum)  # out of a launcher's worker


class Diverged(Exception):  # noqa: N818 - what became of the numbers
    """Training was given up, its checkpoints left as they were.

    Args:
        step: optimizer steps done
        reason: what was seen
    """

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(f"diverged at step {step}: {reason}")


class Pruned(Exception):  # noqa: N818 - what became of the trial
    """A trial of a search was ended early, for others did better.

    Args:
        step: optimizer steps done
        monitor: name of the figure
        value: its last value
    """

    def __init__(self, step: int, monitor: str, value: float) -> None:
        self.step, self.monitor, self.value = step, monitor, value
        super().__init__(f"pruned at step {step}: {monitor} {value:.4f}")


@contextmanager
def stoppable() -> Iterator[None]:
    """While data are built or a model is evaluated, a signal stops at once: there is nothing to save.

    Training replaces these handlers by its own, which let the step end.

    Raises:
        Interrupted
    """
    before = {signum: signal.signal(signum, stop_at_once) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    """A signal handler for when there is nothing to save.

    Raises:
        Interrupted
    """
    raise Interrupted(None, 0, signum)
