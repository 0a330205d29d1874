"""One job of a sweep in a pod: ``python -m blockwright.plugins.kubernetes.pod FOLDER N -- OVERRIDE …``.

Beside what every attempt at a job does (lab/sweep/job.py), it finds its rank, leaves it to the cluster to try failures
again, and says in the termination message how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blockwright.lab.sweep.job import Attempt
from blockwright.lab.sweep.table import FIGURES
from blockwright.plugins.kubernetes.host import NAME
from blockwright.registry import REFUSED, ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.training.jobs import HOST
from blockwright.training.result import DIVERGED, Result

INDEX = "JOB_COMPLETION_INDEX"  # environment variable that a cluster sets: the node of the job
MESSAGE = Path("/dev/termination-log")
LIMIT = 4096  # bytes of a termination message
NAMES_S = 300  # until the names of a job's pods must be known


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code of the training."""
    parser = Parser(prog="python -m blockwright.plugins.kubernetes.pod", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the sweep")
    parser.add_argument("number", metavar="N", type=int, help="of the job")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="of the job, after --")
    parser.add_argument("--after", type=int, metavar="N", help="number of the job whose weights it starts from")
    parser.add_argument("--from-step", type=int, metavar="STEP", help="of that job, from which it continues")
    given = parser.parse_args(arguments)
    start = {key: value for key in ("after", "from_step") if (value := getattr(given, key)) is not None}
    return run(given.folder, given.number, given.overrides, start)


def run(sweep: Path, number: int, overrides: Sequence[str], start: Mapping[str, int] | None = None) -> int:
    """Run a job; arguments and exit code as of ``Attempt``.

    Raises:
        ConfigError: a folder that cannot hold checkpoints, or the first pod's name stays unknown
    """
    attempt, node = Attempt(sweep, number, overrides, start), int(os.environ.get(INDEX, 0))
    if attempt.is_done():  # a pod that was lost after its run had ended
        return _reported(Result.read(attempt.folder), 0) if node == 0 else 0
    if node == 0:
        attempt.make_way()
    code = attempt.run({HOST: NAME, **_joined(node, attempt.tries)}, logged=node == 0)
    if node:
        return code
    code, result = attempt.conclude(code, final=(REFUSED, DIVERGED))
    return _reported(result, code)


def _joined(node: int, tries: int) -> dict[str, str]:
    """In a job of several nodes: wait for the first pod's name, and back off, which a JobSet does not.

    Returns:
        the variables that give the run its rank; this process keeps none, or what it runs later would be taken for a
        child
    """
    if int(os.environ.get("NNODES", 1)) == 1:
        return {}
    if tries > 1:
        time.sleep(min(10 * 2 ** (tries - 2), 160))
    host, until = os.environ["MASTER_ADDR"], time.monotonic() + NAMES_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return {"NODE_RANK": str(node)}
        except OSError:
            if time.monotonic() > until:
                rule = f"has no address after {NAMES_S} s"
                remedy = "Check the cluster's DNS and the headless Service of the job"
                raise ConfigError("MASTER_ADDR", host, rule, remedy) from None
            time.sleep(0.5)


def _reported(result: Result, code: int) -> int:
    """Leave the termination message; returns the exit code."""
    try:
        Path(os.environ.get("TERMINATION_MESSAGE", MESSAGE)).write_text(message(result, code))
    except OSError as error:
        print(f"warning: no termination message ({error})", file=sys.stderr)
    return code


def message(result: Result, code: int) -> str:
    """A result within the 4 KiB of a termination message.

    Of too many figures those stay that a sweep may compare, the table's first: they have a direction.
    """
    compared = [name for name, figure in result.figures.items() if figure.better is not None]
    names = [name for name in dict.fromkeys([*FIGURES, *compared, *result.metrics]) if name in result.metrics]
    short = replace(result, steps=None, fit_seconds=None, code=code, reason=result.reason[:1000])
    kept = _with_figures(short, [])
    for count in range(1, len(names) + 1):
        if len((more := _with_figures(short, names[:count])).encode()) > LIMIT:
            break
        kept = more
    return kept


def _with_figures(result: Result, names: Sequence[str]) -> str:
    """A result with some of its figures, as JSON."""
    metrics = {name: result.metrics[name] for name in names}
    figures = {name: result.figures[name] for name in names if name in result.figures}
    return json.dumps(replace(result, metrics=metrics, figures=figures).to_plain())


if __name__ == "__main__":
    sys.exit(run_command(main))
