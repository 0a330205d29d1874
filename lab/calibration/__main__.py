"""``blockwright calibrate [--only NAME …]``: compare arms whose difference is known, and check that it is seen.

Known effects have to be found, and absent ones not. The runs are small: some minutes on two cores. Those
that are done are not run again, until the code, a package or the machine changes. The result is in calibration.json of
paths.log_dir (paths.log_dir=DIR for another folder), and every report names it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.lab.ablation.definition import Overrides
from blockwright.lab.calibration import control as controls
from blockwright.lab.calibration import record as records
from blockwright.lab.calibration import runs
from blockwright.lab.calibration.control import Control, Outcome, Summary
from blockwright.lab.calibration.record import Record
from blockwright.lab.report.words import signed
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command, strict_json
from blockwright.registry.errors import require
from blockwright.registry.printing import show
from blockwright.training.configuration.composing import compose_config

WORKERS = 2


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0 if the instrument passes, 1 if it does not

    Raises:
        ConfigError: no such control, an invalid one, a missing extra, or a folder that cannot be written
    """
    parser = Parser(prog="blockwright calibrate", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"these controls: {', '.join(controls.FILES.names())}"
    )
    parser.add_argument("--json", action="store_true", help="the outcomes for programs")
    parser.add_argument("--again", action="store_true", help="forget the runs that are done")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes, of one thread each; default: 2")
    paths = [word for word in arguments if "=" in word and not word.startswith("-")]
    asked = parser.parse_args([word for word in arguments if word not in paths])
    if asked.workers < 1:
        raise ConfigError("--workers", asked.workers, "is the number of parallel runs", "Write 1 or more")
    require("lab", "scipy", path="blockwright calibrate")
    known = [controls.read(name) for name in controls.FILES.names()]
    chosen = known if asked.only is None else [controls.read(name) for name in dict.fromkeys(asked.only)]
    log_dir = _log_dir(paths)
    record = calibrate(chosen, known, log_dir, asked.workers, asked.again)
    outcomes = [record.outcomes[each.name] for each in chosen]
    summary = Summary(outcomes)
    sentence = summary.sentence if asked.only is None else f"{summary.counts}: some controls are no calibration."
    if asked.json:
        print(strict_json(as_plain(record, summary, sentence)))
    else:
        show(table(outcomes))
        print(sentence)
    return 0 if summary.passes else 1


def calibrate(
    chosen: Sequence[Control], known: Sequence[Control], log_dir: Path, workers: int, again: bool = False
) -> Record:
    """Run what is not done of some controls, and record every loss at once.

    Args:
        chosen: to run
        known: all, of which those whose runs are complete have an outcome in the record
        log_dir: folder of the record
        workers: processes
        again: whether to forget the runs that are done

    Raises:
        ConfigError: a run is refused, or the folder cannot be written
    """
    before = None if again else records.read(log_dir)
    losses = before.losses() if before is not None and before.instrument == records.instrument() else {}
    record = records.updated(losses, known)
    if waiting := _waiting(chosen, losses):
        runs.check(chosen)
    record.write(log_dir)
    while waiting:  # what is compared after tuning is known once the tries have ended
        for done, (run, loss) in enumerate(runs.all_losses(waiting, workers), start=1):
            losses[run] = loss
            record = records.updated(losses, known)
            record.write(log_dir)
            of = len(waiting)
            end = "\r" if sys.stderr.isatty() and done < of else "\n"
            if sys.stderr.isatty() or done == of:
                print(f"{done} of {of} runs", end=end, file=sys.stderr, flush=True)
        waiting = _waiting(chosen, losses)
    return record


def _waiting(controls: Iterable[Control], losses: Mapping[Overrides, float]) -> list[Overrides]:
    return list(dict.fromkeys(run for control in controls for run in control.missing(losses)))


def _log_dir(overrides: Sequence[str]) -> Path:
    """Where the result is recorded."""
    for override in overrides:
        if not override.startswith("paths."):
            rule = "is no path, and the runs of controls have settings of their own"
            raise ConfigError("command line", override, rule, "Leave it out, or write paths.log_dir=DIR")
    log_dir = compose_config(overrides).paths.log_dir
    if not isinstance(log_dir, str):
        raise ConfigError("paths.log_dir", log_dir, "must name a folder", "Write paths.log_dir=FOLDER")
    return Path(log_dir)


def table(outcomes: Iterable[Outcome]) -> Table:
    """A row for each control."""
    shown = Table("control", "arm − baseline, nats", "expected", "seen", "", box=box.SIMPLE_HEAD, highlight=False)
    for each in outcomes:
        expected = f"{each.expect} by {each.least:g}" if each.least else each.expect
        wrong = f"{each.wrong} of {each.repeats} wrong" if each.repeats > 1 else "wrong"
        mark = Text(wrong, style="bold red") if each.wrong else Text("")
        shown.add_row(Text(each.name), difference(each), expected, each.seen, mark)
    return shown


def difference(outcome: Outcome) -> str:
    """``+0.2923 (+0.2710 to +0.3131)``"""
    if outcome.mean is None:
        return "no difference is known"
    if outcome.low is None or outcome.high is None:
        return signed(outcome.mean, 4)
    return f"{signed(outcome.mean, 4)} ({signed(outcome.low, 4)} to {signed(outcome.high, 4)})"


def as_plain(record: Record, summary: Summary, sentence: str) -> dict[str, object]:
    """The outcomes for programs."""
    return {
        "passes": summary.passes,
        "sentence": sentence,
        "date": record.date,
        **asdict(record.instrument),
        "controls": [{**asdict(each), "passes": not each.wrong} for each in summary.outcomes],
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
