"""Whether a configured task is one of this project's, known by its class and not by its name."""

from __future__ import annotations

from typing import Any

from training.configuration.instantiate import find_target


def is_task(dotted: Any) -> bool:
    """Whether a ``_target_`` is a subclass of ``Task``: it has a composed model, weights to start from, checkpoints.

    Raises:
        ConfigError: it cannot be imported
    """
    if str(dotted).startswith(f"{__package__}."):  # ours: a refusal need not import Lightning to know them
        return True
    from training.tasks.base import Task

    target = find_target(str(dotted), "task")
    return isinstance(target, type) and issubclass(target, Task)
