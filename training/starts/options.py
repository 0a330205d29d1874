"""Which starts to write for what a run lacks, for the remedies of refusals."""

from __future__ import annotations

from collections.abc import Callable

from blockwright import registry
from blockwright.training.configuration import conf
from blockwright.training.starts.base import Start


def options(suits: Callable[[type[Start]], bool]) -> list[str]:
    """``NAME=OPTION`` of every registered start whose class suits."""
    classes = {name: registry.lookup("start", name).cls for name in registry.names("start")}
    return [f"{name}={option}" for name, cls in classes.items() if suits(cls) for option in conf.options(name)]  # type: ignore[arg-type]
