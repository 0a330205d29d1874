"""The stages of a mixture as configured: shares by source, and how many batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.training.data.mixture.shares import ONE, Stage

PATH = "data.stages"
EXAMPLE = "Write [{shares: {web: 0.7, code: 0.3}, batches: 9000}, {shares: {web: 0.4, code: 0.6}}]"
TOLERANCE = 1e-6  # of a sum of shares


def read(value: Any, sources: Collection[str]) -> tuple[Stage, ...] | None:
    """Stages as configured; None where shares follow the sizes of the sources.

    Args:
        value: ``data.stages``
        sources: their names

    Raises:
        ConfigError: at ``data.stages``
    """
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(PATH, value, "must list at least one stage, or be null", EXAMPLE)
    stages = tuple(_stage(f"{PATH}.{i}", each, i == len(value) - 1, sources) for i, each in enumerate(value))
    for name in sources:
        if not any(name in stage.weights for stage in stages):
            rule = "is in no stage, so it would never be read"
            raise ConfigError(
                f"data.sources.{name}", name, rule, f"Give it a share, or leave it out: ~data.sources.{name}"
            )
    return stages


def shares_of(value: Any, path: str, sources: Collection[str]) -> dict[str, int]:
    """Shares that sum to 1 as whole numbers; sources with a share of 0 are left out.

    Args:
        value: source → share
        path: of the setting
        sources: names of all

    Raises:
        ConfigError: at ``path``
    """
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(path, value, "maps sources to their shares", "Write {web: 0.7, code: 0.3}")
    for name, share in value.items():
        if name not in sources:
            raise ConfigError(f"{path}.{name}", share, "there is no such source", did_you_mean(name, sources))
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"{path}.{name}", share, "a share is a number from 0 to 1", "Write {web: 0.7, code: 0.3}")
        if share and not round(share * ONE):
            raise ConfigError(
                f"{path}.{name}", share, f"is below {1 / ONE:.0e}, the least share", "Raise it, or write 0"
            )
    total = sum(value.values())
    if abs(total - 1) > TOLERANCE:
        fixed = {name: round(share / total, 6) for name, share in value.items()} if total else "shares above 0"
        raise ConfigError(path, dict(value), f"the shares sum to {total:g}, not to 1", f"Write, for example, {fixed}")
    return {name: round(share * ONE) for name, share in value.items() if share}


def _stage(path: str, value: Any, is_last: bool, sources: Collection[str]) -> Stage:
    if not isinstance(value, Mapping) or "shares" not in value:
        raise ConfigError(path, value, "a stage is a mapping with shares", EXAMPLE)
    for key in value:
        if key not in ("shares", "batches"):
            raise ConfigError(
                f"{path}.{key}", value[key], "a stage has no such key", did_you_mean(key, ("shares", "batches"))
            )
    weights, batches = shares_of(value["shares"], f"{path}.shares", sources), value.get("batches")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ConfigError(f"{path}.batches", batches, "counts batches, at least 1", EXAMPLE)
    if (batches is None) != is_last:
        rule = "the last stage has no end" if is_last else "every stage but the last ends after so many batches"
        remedy = "Leave batches out of the last stage" if is_last else EXAMPLE
        raise ConfigError(f"{path}.batches", batches, rule, remedy)
    return Stage(weights, batches)
