"""Start-up times: help, catalogue, a refusal, the first step. In CPU seconds, independent of other load.

``python -m benchmarks.startup``. Every command is a separate process, measured from start to end; the first step ends
its process itself (benchmarks/callbacks.py). Commands take turns; one round beforehand warms the disk cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, record
from benchmarks.callbacks import MARK
from benchmarks.race import spread
from benchmarks.record import Ratio, Result, Table
from blockwright.registry import REFUSED

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEP = "+callbacks.first_step._target_=benchmarks.callbacks.FirstStep"
COMMANDS: dict[str, tuple[list[str], int, float]] = {  # arguments, exit code, CPU seconds promised
    "help": (["train.py", "--help"], 0, 3.0),
    "catalogue": (["-m", "blockwright.registry"], 0, 3.0),
    "refusal": (["train.py", "model.attention.n_heads=7"], REFUSED, 3.0),
    "first optimizer step of the default model": (["train.py", FIRST_STEP], 0, 7.0),
}


def cpu_seconds(arguments: Sequence[str], expected: int) -> float:
    """CPU seconds of a command.

    Raises:
        RuntimeError: it ends with another code than expected
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as out:
        own = [f"hydra.run.dir={folder}"] if "train.py" in arguments and "--help" not in arguments else []
        environment = {**os.environ, "TERM": "dumb"}
        child = subprocess.Popen(
            [sys.executable, *arguments, *own], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read()
    if child.returncode != expected:
        raise RuntimeError(f"{' '.join(arguments)} ended with {child.returncode}:\n{said[-2000:]}")
    marked = [line.removeprefix(MARK) for line in said.splitlines() if line.startswith(MARK)]
    return float(marked[0]) if marked else usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the commands, and save their times."""
    parser = record.parser("startup", __doc__, rounds=5, minutes=3)
    given = record.read(parser, arguments)
    result = Result("startup", machine.about("cpu", given.threads))
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    chosen = {name: command for name, command in COMMANDS.items() if record.wanted(name, given.only)}
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    for index in range(given.rounds + (0 if given.quick else 1)):
        for name, (command, code, _) in chosen.items():
            seconds = cpu_seconds(command, code)
            if index or given.quick:
                taken[name].append(seconds)
    table = Table("Start-up", ("command", "CPU seconds", "q1", "q3", "promised at most"), plotted="CPU seconds")
    for name, seconds_of in taken.items():
        s, bound = spread(seconds_of), chosen[name][2]
        table.rows.append([name, s.median, s.q1, s.q3, bound])
        # CPU seconds are compared with a promise in seconds, so this is not a ratio for benchmarks.check.
        share = spread([seconds / bound for seconds in seconds_of])
        result.ratios.append(Ratio(f"startup · {name} ÷ promised CPU seconds", share, "less", 1.0, checked=False))
    result.tables.append(table)
    result.raw = dict(taken)
    print(result.save(given.out))
    return result


if __name__ == "__main__":
    main()
