"""Callbacks and plugins that only observe: adding, changing or removing one changes no weight and no figure.

A class says so itself, by a class attribute ``observes`` with the reason, in words. One that does not counts as
changing numbers, as does any callback of Lightning's but the following.
"""

from __future__ import annotations

from typing import Any

from blockwright.training.configuration.instantiate import find_target


def why_left_out(target: Any, path: str) -> str | None:
    """Why a class is no part of the record of a run; None if it is a part.

    Args:
        target: its dotted path
        path: of the setting

    Raises:
        ConfigError: it cannot be imported
    """
    cls = find_target(target, path)
    if not isinstance(cls, type):
        return None
    return getattr(cls, "observes", None) or next((why for base, why in _of_lightning() if issubclass(cls, base)), None)


def _of_lightning() -> list[tuple[type, str]]:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import callbacks

    return [
        (CheckpointIO, "writes files"),
        (callbacks.Checkpoint, "chooses which weights are kept"),
        (callbacks.ProgressBar, "shows what was logged"),
        (callbacks.ModelSummary, "shows the model"),
        (callbacks.LearningRateMonitor, "logs rates that are set elsewhere"),
        (callbacks.DeviceStatsMonitor, "logs what the device is doing"),
        (callbacks.ThroughputMonitor, "measures speed"),
        (callbacks.BasePredictionWriter, "writes predictions"),
    ]
