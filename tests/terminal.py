"""A command on a terminal of its own: keys are typed, and what it shows is read."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

INTERRUPT = "\x03"  # Ctrl-C
SECONDS = 120.0


class Terminal:
    """A process whose input, output and errors are a terminal.

    Args:
        words: of ``blockwright``
        environment: of the process

    Attributes:
        shown: everything so far
        before: settings of the terminal when the process began
    """

    def __init__(self, words: list[str], environment: Mapping[str, str]) -> None:
        self._ours, self.theirs = pty.openpty()
        self.before, self.shown, self._at = self.settings, "", 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blockwright", *words],
            env={**environment, "TERM": "dumb"},
            preexec_fn=self._log_in,
        )

    def _log_in(self) -> None:
        """Ctrl-C interrupts on a terminal, even where these tests run in the background, which ignores it."""
        os.login_tty(self.theirs)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def settings(self) -> list[Any]:
        """Of the terminal: whether keys are echoed, which one interrupts, and so on."""
        return termios.tcgetattr(self.theirs)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def until(self, pattern: str) -> None:
        """Read on until a pattern is shown, after the last one that was."""
        end = time.monotonic() + SECONDS
        while (found := re.compile(pattern, re.DOTALL).search(self.shown, self._at)) is None:
            assert self._read(end - time.monotonic()), f"{pattern!r} does not come: {self.shown}"
        self._at = found.end()

    def end(self, pressing: str = "") -> int:
        """The exit code of the process, which ends by itself.

        Args:
            pressing: keys, pressed again every ten seconds. Python's ``input`` shows its prompt a moment before it
                waits for keys, and a Ctrl-C within that moment is heard at the next key
        """
        start = pressed = time.monotonic()
        self.type(pressing)
        while self.process.poll() is None:  # what it writes has to be read
            self._read(0.05)
            now = time.monotonic()
            assert now < start + SECONDS, f"it does not end: {self.shown}"
            if now > pressed + 10:
                self.type(pressing)
                pressed = now
        while self._read(0.05):
            pass
        return self.process.returncode

    def close(self) -> None:
        """End the process whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self.theirs)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], max(0.0, seconds))[0]:
            return False
        self.shown += os.read(self._ours, 65536).decode(errors="replace")
        return True


@contextmanager
def on_a_terminal(words: list[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A command at work, and no process after it."""
    terminal = Terminal(words, environment)
    try:
        yield terminal
    finally:
        terminal.close()
