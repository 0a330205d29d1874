"""Patterns of parameter names: ``attention``, ``layers.0``, ``*.bias``; ``!images``: all but the images'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.schema import conforms


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter's name, or whole parts of it.

    Args:
        name: ``layers.0.attention.query.weight``
        pattern: a shell pattern for the whole name, or for consecutive parts of it between dots; with ``!`` before it,
            for what it does not match
    """
    if pattern.startswith("!"):
        return not matches(name, pattern[1:])
    return any(fnmatchcase(name, p) for p in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))


def matching(names: Iterable[str], patterns: Sequence[str], path: str, of: str = "parameter") -> list[str]:
    """The names that match any of the patterns.

    Args:
        of: what the names are of, for messages

    Raises:
        ConfigError: they are no list of patterns, or one matches none of the names
    """
    if not conforms(patterns, list[str]):
        raise ConfigError(path, patterns, "must be a list of patterns of names", f"Write {path}=[embedding]")
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            rule = f"matches no {of} of the model"
            raise ConfigError(path, pattern, rule, did_you_mean(pattern, parts))
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]
