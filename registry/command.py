"""Shared behaviour of all command lines: wrong arguments, interruption, broken pipes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from blockwright.registry.errors import REFUSED, ConfigError, did_you_mean, refusal_of_full, refused_path

INTERRUPTED = 130  # 128 + SIGINT


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ``ConfigError`` and accepts no abbreviated options."""

    def __init__(self, *, prog: str, description: str | None = None) -> None:
        shown = description and description.replace("``", "")  # marks around names of code
        super().__init__(prog=prog, description=shown, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        _, unknown, wrong = message.rpartition("unrecognized arguments: ")
        if not unknown:
            raise ConfigError("command line", " ".join(sys.argv[1:]), message, f"See {self.prog} --help")
        flags = [flag for action in self._actions for flag in action.option_strings]
        remedy = did_you_mean(wrong.split()[0], flags)
        if wrong.split()[0] in ("-m", "--multirun"):
            remedy = "Leave it out: this command already runs all values"
        raise ConfigError("command line", wrong, message, remedy)


def run_command(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        command: takes the arguments, may return an exit code, and raises ``ConfigError`` for wrong arguments
        arguments: None for those of the process

    Returns:
        the exit code; a ``ConfigError`` and a full disk are printed as one message
    """
    try:
        code = command(sys.argv[1:] if arguments is None else arguments) or 0
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        refusal = refusal_of_full(error) or refused_path(error, "Name another path, or correct its permissions")
        if refusal is None:
            raise
        print(refusal.render(), file=sys.stderr)
        return REFUSED
