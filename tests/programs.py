"""Commands of ``blockwright``, one after the other in one process: what each said, and which files there were then."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

DRIVER = """
import contextlib, gc, io, json, pathlib, sys, traceback, zlib
from blockwright import train
from blockwright.command import run
from blockwright.registry.command import run_command
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

if "hydra_once" not in sys.modules:
    import hydra_once
    hydra_once.install()

# Hydra composes everything once more, beforehand, to see whether a file asks for a sweep: half of the time of this.
Hydra.get_mode = lambda *_, **__: RunMode.MULTIRUN if "-m" in sys.argv else RunMode.RUN
exec(json.loads(sys.stdin.readline()))
for name, arguments in json.loads(sys.stdin.readline()).items():
    GlobalHydra.instance().clear()
    sys.argv = ["train.py", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(run, arguments) if arguments[0] in ("blocks", "describe") else train.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = "raised"
    files = [p for p in pathlib.Path("run").rglob("*") if p.is_file() and p.name != "train.log"]
    run_files = {str(p): zlib.crc32(p.read_bytes()) for p in files}
    print(json.dumps([name, [code or 0, out.getvalue(), err.getvalue(), run_files, "lightning" in sys.modules]]))
"""


class Outcome(NamedTuple):
    """What a command did.

    Attributes:
        files: name → checksum of the files in the folder ``run`` afterwards, without logs
        lightning: whether the process had imported Lightning by then
    """

    code: int | str
    out: str
    err: str
    files: dict[str, int]
    lightning: bool

    @property
    def said(self) -> str:
        return self.out + self.err


def run_all(
    start: Callable[..., Any], commands: Mapping[str, Sequence[str]], first: str = "", **given: Any
) -> dict[str, Outcome]:
    """Run commands in one process.

    Args:
        start: runs ``python ARGUMENTS``, as ``Warm.run`` does
        commands: name → arguments of ``train.py``, or a command that describes blocks or models
        first: Python that the process executes before them
        given: arguments of ``start``
    """
    done = start("-c", DRIVER, input=f"{json.dumps(first)}\n{json.dumps(commands)}\n", **given)
    assert done.returncode == 0, done.stderr
    return {name: Outcome(*outcome) for name, outcome in map(json.loads, done.stdout.splitlines())}
