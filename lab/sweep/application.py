"""What the plug-ins for Hydra say in an application that is not this project's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.registry import ConfigError

NEEDS = ("optimized_metric", "task_name")


def check_application(config: Mapping[str, Any], path: str, value: str, instead: str) -> None:
    """Refuse another application's configuration.

    Args:
        config: as composed
        path, value: the choice that was made
        instead: what serves any application

    Raises:
        ConfigError: at ``path``
    """
    if missing := [key for key in NEEDS if key not in config]:
        rule = f"serves runs of this project alone: this application's configuration has no {missing[0]}"
        raise ConfigError(path, value, rule, f"Run blockwright train -m …; or choose {instead}")
