"""Tasks and data modules built by name, as a run builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockwright.training.configuration import parts


def task(
    name: str,
    model: Mapping[str, Any],
    optimizer: Any,
    scheduler: Any,
    seed: int = 0,
    init_from: str | None = None,
    starts: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """A task of a run, whose own settings are ``settings``."""
    of_the_run = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seed": seed}
    of_the_run["starts"] = [*parts.starts({"init_from": init_from}), *starts]
    return parts.build("task", {"task": {"name": name, **settings}, **of_the_run})


def data(name: str, model: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """A data module of a run, whose model only pictures need."""
    return parts.build("data", {"data": {"name": name, **settings}, "model": model})
