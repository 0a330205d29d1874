"""Execute a checked run, up to its figures. Both entry points end in ``conclude``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from rich.table import Table

from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.registry.printing import show
from blockwright.training.callbacks.interruption import Recording, last_checkpoint
from blockwright.training.callbacks.step_end import Finale
from blockwright.training.checkpoints.record import record
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import OWN, Node, Run
from blockwright.training.parallel.dry_run import dry_run, imagine
from blockwright.training.result import Interrupted

LOGGED = ("task_name", "seed", "model", "optimizer", "scheduler", "data")


def execute(run: Run, announce: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train, validate and test as configured.

    Args:
        run: checked
        announce: called when all parts are built, so that nothing can be refused after it but by the data

    Returns:
        the last value of everything that was logged

    Raises:
        ConfigError: an argument of the trainer, a callback, a logger, the data or the task is wrong
        Interrupted: stopped by a signal, after saving
    """
    quieten(run.extras["ignore_warnings"])
    node = {key: value for key, value in run.trainer.items() if key not in OWN}
    if run.trainer.get("world") or run.trainer.get("dry_run"):
        announce()
        return imagine(run) if run.trainer.get("world") else dry_run(run, node)
    L.seed_everything(run.seed, verbose=False)
    callbacks, loggers = _built("callbacks", run.callbacks), _built("logger", run.logger)
    data, task = parts.build("data", run), parts.build("task", run)
    shown = run.shown
    callbacks.append(Recording(record(shown)))
    trainer = instantiate({**no_bar(callbacks), **node, "callbacks": callbacks, "logger": loggers or False}, "trainer")
    announce()
    for logger in trainer.loggers:
        logger.log_hyperparams({k: shown[k] for k in LOGGED})
    try:
        if run.train:
            with restoring(trainer, run.ckpt_path):
                trainer.fit(task, datamodule=data, weights_only=True)
            with _resumable(trainer):
                return conclude(trainer, task, data, test=run.test)
        return conclude(trainer, task, data, test=run.test, ckpt_path=run.ckpt_path)
    except BaseException:
        # End the other processes of a failed run, and Lightning's monitoring of them. Lightning kills the
        # whole process group when a rank fails; in a sweep that includes the parent.
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.kill()
            process.wait()
            process.returncode = 0  # read by the monitor
        raise
    finally:
        _finish(trainer.loggers)


def _finish(loggers: Sequence[Logger]) -> None:
    """End the sessions of loggers that have one, as Weights and Biases: a sweep's next job may be in this process."""
    for logger in loggers:
        session = getattr(logger, "experiment", None)
        if callable(finish := getattr(session, "finish", None)):
            finish()


def _built(group: str, nodes: Mapping[str, Node | None]) -> list[Any]:
    """The callbacks or loggers that are not switched off."""
    return [instantiate(node, f"{group}.{name}") for name, node in nodes.items() if node]


@contextmanager
def restoring(trainer: L.Trainer, ckpt_path: str | None) -> Iterator[None]:
    """Name the trainer's checkpoint before it builds the model, which then reads nothing else to start from.

    Lightning's argument ``ckpt_path`` says it to the trainer, and so to the task, only afterwards. Where there is none,
    Lightning would load what an earlier job of Slurm has left in the folder, also to measure weights that are newer.
    """
    trainer.ckpt_path = ckpt_path
    with patch.object(type(trainer._checkpoint_connector), "_hpc_resume_path", None):
        try:
            yield
        finally:
            trainer.ckpt_path = None


@contextmanager
def _resumable(trainer: L.Trainer) -> Iterator[None]:
    """Let a stop after the last step name the checkpoint, from which the same command only measures."""
    try:
        yield
    except Interrupted as stop:
        last = last_checkpoint(trainer)
        raise Interrupted(last if last.exists() else None, trainer.global_step, stop.signum) from None


def no_bar(callbacks: Sequence[Any]) -> dict[str, bool]:
    """Arguments of the trainer that keep Lightning's own progress bar out of pipes and files.

    Args:
        callbacks: of the trainer; a progress bar among them disables this
    """
    shows = sys.stdout.isatty() or any(isinstance(callback, ProgressBar) for callback in callbacks)
    return {} if shows else {"enable_progress_bar": False}


def leave_processes() -> None:
    """Destroy the process group, if there is one: without it exits were seen to hang for minutes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def conclude(
    trainer: L.Trainer,
    task: L.LightningModule,
    data: L.LightningDataModule,
    *,
    test: bool,
    ckpt_path: str | None = None,
) -> dict[str, float]:
    """Measure the trained model on all held-out text, and call every Finale.

    Validation during training may use a part of the text (``data.eval_windows``); these figures never do.
    """
    metrics = _numbers(trainer)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return _tell(trainer, task, metrics)
    return measure(trainer, task, data, ("validate", "test") if test else ("validate",), ckpt_path, metrics)


def measure(
    trainer: L.Trainer,
    task: L.LightningModule,
    data: L.LightningDataModule,
    commands: Sequence[str],
    ckpt_path: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Measure on all of the text, call every Finale, and print the figures if there is none.

    Args:
        trainer: as configured
        task: to measure
        data: all its windows are used, whatever ``eval_windows`` is
        commands: of the trainer: ``validate``, ``test``
        ckpt_path: checkpoint to measure, at whose step to log; None for the task's current weights
        metrics: figures known already

    Returns:
        ``metrics`` and the measured ones
    """
    data.eval_windows = None  # type: ignore[attr-defined]
    if ckpt_path is not None:
        # Set the step to a checkpoint's, so that its figures are not logged at step 0
        loops = read_checkpoint(ckpt_path, shapes_only=True).get("loops") or {}
        if "fit_loop" in loops:
            trainer.fit_loop.load_state_dict(loops["fit_loop"])
    found = dict(metrics or {})
    for command in commands:
        with restoring(trainer, ckpt_path):
            getattr(trainer, command)(task, data, weights_only=True, verbose=False)
        found |= _numbers(trainer)
    return _tell(trainer, task, found)


def _tell(trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> dict[str, float]:
    if not trainer.is_global_zero:
        return metrics
    finales = [callback for callback in trainer.callbacks if isinstance(callback, Finale)]  # type: ignore[attr-defined]
    for callback in finales:
        callback.on_conclusion(trainer, task, metrics)
    if not finales:
        table = Table("figure", "value")
        for name, value in metrics.items():
            table.add_row(name, f"{value:.9g}")
        show(table)
    return metrics


def _numbers(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if getattr(value, "ndim", 0) == 0}


def quieten(ignore: bool) -> None:
    """Silence Lightning's start-up advice; with ``ignore`` all other warnings too."""
    for name in ("fabric.utilities.seed", "fabric.utilities.distributed", "pytorch.utilities.rank_zero"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.trainer.connectors.signal_connector").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # on a machine of Slurm, outside of its jobs
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # Logged values come from torchmetrics, which sum over the ranks themselves.
    warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist=True.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    if ignore:
        warnings.simplefilter("ignore")
