"""Run trainings one after another in a few processes: starting a process for each would take longer than a run.

Each is composed, parsed, checked and executed as ``blockwright train`` does it.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

from blockwright.lab.ablation.definition import Overrides
from blockwright.lab.calibration.control import METRIC, Control
from blockwright.training.configuration.composing import compose_config
from blockwright.training.result import Diverged

QUIET = (  # no files, one evaluation at the end; before the overrides of a control
    "callbacks=[machine,guard]",
    "logger=none",
    "test=false",
    "trainer.val_check_interval=1000000000",
    "++trainer.enable_checkpointing=false",
    "extras.ignore_warnings=true",
)


def check(controls: Iterable[Control]) -> None:
    """Check the runs of controls, before the first of them starts.

    Raises:
        ConfigError: blockwright train would refuse one, for instance for a missing extra
    """
    from blockwright.training.entry.parse import parse_settings
    from blockwright.training.entry.preflight import check as check_run

    for overrides in dict.fromkeys(arm.runs[0].overrides for each in controls for arm in each.sweeps({})[0].arms):
        check_run(parse_settings(compose_config([*QUIET, *overrides], output_dir=".")))


def loss_of(overrides: Sequence[str]) -> float:
    """Train, and return the validation loss; infinite if training diverged.

    Args:
        overrides: as of blockwright train
    """
    from blockwright.training.entry.execute import execute
    from blockwright.training.entry.preflight import prepare

    with tempfile.TemporaryDirectory() as folder:
        try:
            return execute(prepare(compose_config([*QUIET, *overrides], output_dir=folder)))[METRIC]
        except Diverged:
            return math.inf


def all_losses(runs: Iterable[Overrides], workers: int) -> Iterator[tuple[Overrides, float]]:
    """The losses of runs, as they end.

    Args:
        runs: their overrides
        workers: processes, of one thread each: so small a model is not faster with more

    Raises:
        ConfigError: of a run
    """
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin) as pool:
        waiting: dict[Future[float], Overrides] = {pool.submit(loss_of, run): run for run in runs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """Prepare a worker: one thread, no tables of figures on the terminal, and an end when its parent is gone."""
    import torch

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # until the process ends
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process with its parent: a killed parent closes no queue, and a worker would wait at it for ever."""
    wait([sentinel])
    os._exit(1)
