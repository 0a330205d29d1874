"""Record which plug-in packages a model needs; refuse a checkpoint when one is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from blockwright import registry
from blockwright.registry import ConfigError, catalogue
from blockwright.registry.index import PROJECT


def distributions(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Distribution → its version and the blocks of the composition that it provides, without this project."""
    words = set(_words(model))
    found: dict[str, dict[str, Any]] = {}
    for kind in registry.kinds():
        for name in registry.names(kind):
            if name in words and (provider := catalogue.provider(kind, name)) != PROJECT:
                entry = found.setdefault(provider, {"version": _version(provider), "blocks": []})
                entry["blocks"].append(f"{kind}/{name}")
    return found


def check(wanted: Any, path: str) -> None:
    """Refuse a checkpoint that needs plug-in blocks that are not installed.

    Args:
        wanted: the result of ``distributions`` stored in it; None for older checkpoints
        path: of the checkpoint, for the error message

    Raises:
        ConfigError: names the missing distribution
    """
    for provider, entry in (wanted or {}).items():
        for block in entry["blocks"]:
            kind, _, name = block.partition("/")
            if name not in registry.names(kind):
                release = entry["version"]
                rule = (
                    f"was trained with {block} of {provider}{f' {release}' if release else ''}, which is not installed"
                )
                pinned = f"{provider}=={release}" if release else provider
                raise ConfigError("ckpt_path", path, rule, f"pip install '{pinned}'")


def _version(provider: str) -> str | None:
    try:
        return version(provider)
    except PackageNotFoundError:
        return None


def _words(value: Any) -> Iterator[str]:
    """Every word in the strings of a composition: block names occur alone, or in a pattern of layers."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield from re.findall(r"\w+", value)
