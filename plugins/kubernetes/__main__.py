"""``blockwright kubernetes run|render|status|logs|stop|resume|retry [OVERRIDE …]``: run or sweep on a cluster.

A run is a sweep of one job: ``run OVERRIDE …`` is ``blockwright train -m hydra/launcher=kubernetes OVERRIDE …``, so it
has the same options (hydra.launcher.*), folder and table, and is resumed in the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright.lab.sweep import plan as plans
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.command import Parser, quoted, run_command
from blockwright.training import jobs

OF_A_SWEEP = ("status", "stop", "resume", "retry")
OPTIONS = ("--prefix", "--tail=-1", "--max-log-requests=100")
FOLLOW = "--follow"
REST = f"run: OVERRIDES; render: FOLDER OVERRIDES; logs: DIR [N] [{FOLLOW}]; others: DIR [N]"
# Overrides that the actions make, and by which.
SET_HERE = {
    "hydra/launcher": "run and render are of hydra/launcher=kubernetes",
    "hydra.launcher.render": "render FOLDER",
}
ACTIONS = ("run", "render", "logs", *OF_A_SWEEP)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ConfigError: no such action, or what the action refuses
    """
    parser = Parser(prog="blockwright kubernetes", description=__doc__)
    parser.add_argument("action", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument("rest", nargs="*", metavar="…", help=REST)
    head, tail = list(arguments[:1]), list(arguments[1:])
    action = parser.parse_args(head).action
    if action not in ACTIONS:
        raise ConfigError("command line", action, "is not an action", did_you_mean(action, ACTIONS))
    if action in OF_A_SWEEP:
        from blockwright.lab.sweep.__main__ import main as sweep

        return sweep([action, *tail])
    if action == "logs":
        return logs(tail)
    if action == "render":
        if not tail or "=" in tail[0]:
            raise ConfigError("command line", "render", "needs a folder", "Write render FOLDER OVERRIDE …")
        return run([f"hydra.launcher.render={quoted(Path(tail[0]).absolute())}", *checked(tail[1:])])
    return run(checked(tail))


def checked(overrides: Sequence[str]) -> Sequence[str]:
    """Overrides that leave the action as it is.

    Raises:
        ConfigError: one would win over the launcher or the folder that the action sets
    """
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in SET_HERE:
            raise ConfigError(key, value, f"is set by the action: {SET_HERE[key]}", "Leave it out")
    return overrides


def run(overrides: Sequence[str]) -> int:
    """Replace this process by a multirun on the cluster."""
    command = [sys.executable, *jobs.TRAIN, "-m", "hydra/launcher=kubernetes", *overrides]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def logs(arguments: Sequence[str]) -> int:
    """Print the logs of a sweep's pods, or of one job's; with ``--follow`` what comes, too.

    Raises:
        ConfigError: an error in the command line, or not a sweep on a cluster
    """
    parser = Parser(prog="blockwright kubernetes logs", description="The logs of a sweep's pods, or of one job's.")
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of a sweep")
    parser.add_argument("job", metavar="N", type=int, nargs="?", help="number of one job")
    parser.add_argument(FOLLOW, action="store_true", help="print what comes, too")
    given = parser.parse_args(list(arguments))
    from blockwright.plugins.kubernetes.host import NAME, jobs_of
    from blockwright.plugins.kubernetes.options import GROUP

    sweep = given.dir.resolve()
    plan = plans.read(sweep)
    if NAME not in plan:
        rule = "was not started on a cluster"
        raise ConfigError("DIR", str(sweep), rule, "Its logs are in its folders: DIR/N/job.log")
    found = jobs_of(sweep, plan)
    selector = found.selector + (f",{GROUP}/job={given.job}" if given.job is not None else "")
    if given.follow:
        sys.stdout.flush()
        return found.cluster.follow("logs", FOLLOW, "--selector", selector, *OPTIONS)
    print(found.cluster.call("logs", "--selector", selector, *OPTIONS)[0], end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
