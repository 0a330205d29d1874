"""Recognise this project's tasks by class, not by name."""

from __future__ import annotations

from typing import Any

from blockwright.training.configuration.instantiate import find_target


def is_task(dotted: Any) -> bool:
    """Whether a ``_target_`` is a subclass of ``Task``, with a composed model, ``init_from`` and checkpoints.

    Raises:
        ConfigError: it cannot be imported
    """
    if str(dotted).startswith(f"{__package__}."):  # ours: known without importing Lightning
        return True
    from blockwright.training.tasks.base import Task

    target = find_target(str(dotted), "task")
    return isinstance(target, type) and issubclass(target, Task)
