"""Command line options of all benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.record import RESULTS


def parser(name: str, description: str | None, *, rounds: int, minutes: float) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        name: of the benchmark, ``benchmarks.<name>``
        description: its module's docstring
        rounds: default maximum of rounds
        minutes: approximate default duration of the whole run
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").partition("\n")[0]
    )
    made.add_argument("--quick", action="store_true", help="the smallest shape, a round or two: whether it runs at all")
    made.add_argument("--rounds", type=_positive, default=rounds, help="at most so many (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=minutes, help="begin no round after (default: %(default)s)")
    made.add_argument("--only", metavar="TEXT", help="rows and tables whose name has this in it; several by comma")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--threads", type=_positive, default=machine.cores(), help="of a CPU (default: all)")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (default: benchmarks/results)")
    return made


def add_names(made: argparse.ArgumentParser, option: str, default: str, known: Sequence[str]) -> None:
    """Add an option that takes some of the known names, separated by commas."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r} among {', '.join(known)}")
        return names

    words = f"of {', '.join(known)}; several by comma (default: {default})"
    made.add_argument(f"--{option}", type=read, default=default.split(","), metavar="NAMES", help=words)


def read(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options; ``--quick`` is one round without a time limit."""
    given = made.parse_args(arguments)
    if given.quick:
        given.rounds, given.minutes = 1, 0.0
    return given


def wanted(name: str, only: str | None) -> bool:
    """Whether a name matches ``--only``."""
    return only is None or any(part.strip().lower() in name.lower() for part in only.split(","))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value
