"""The data module of a task that needs one of a certain kind."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

from blockwright.registry import ConfigError

Module = TypeVar("Module", bound=L.LightningDataModule)


def data_of(task: L.LightningModule, kind: type[Module], rule: str, remedy: str) -> Module:
    """The data module that a task trains on.

    Args:
        task: with a trainer
        kind: what the task needs
        rule: what another module lacks
        remedy: what to write instead

    Raises:
        ConfigError: it is of another kind
    """
    found = task.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(found, kind):
        raise ConfigError("data", type(found).__name__, rule, remedy)
    return found
