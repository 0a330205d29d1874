"""Resolve ``${a.b}`` in the values of a file of a folder, by other values of the same file.

OmegaConf's own resolvers, which can read the environment, are never called: the folder may be untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from blockwright.registry.errors import ConfigError
from blockwright.registry.limits import MAX_DEPTH, MAX_TEXT

_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


class References:
    """The values of a file.

    Args:
        root: the whole file, as plain values
        path: of the file, for messages
        remedy: for the same
    """

    def __init__(self, root: Mapping[str, Any], path: str, remedy: str) -> None:
        self.root, self.path, self.remedy = root, path, remedy
        self._known: dict[str, Any] = {}
        self._open: list[str] = []
        self._written = 0  # characters in place of references, of the whole file

    def resolve(self, value: Any) -> Any:
        """A value, with what it refers to in place of its references.

        Raises:
            ConfigError: it refers to anything but a value of the file, or grows beyond the limits
        """
        if isinstance(value, Mapping):
            return {key: self.resolve(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.resolve(inner) for inner in value]
        return self._text(value) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str) -> Any:
        if whole := _REFERENCE.fullmatch(text):
            return self._counted(self._named(whole[1]), text)
        if "${" in _REFERENCE.sub("", text):
            raise self._refusal(text, "is an interpolation, and one in a run's folder may only name its other settings")
        parts = enumerate(_REFERENCE.split(text))
        return "".join(part if i % 2 == 0 else str(self._counted(self._named(part), text)) for i, part in parts)

    def _counted(self, value: Any, text: str) -> Any:
        """A value that stands in place of a reference in a text."""
        self._written += len(str(value))
        if self._written > MAX_TEXT:
            raise self._refusal(text, f"refers to other settings, which come to more than {MAX_TEXT:,} characters")
        return value

    def _named(self, name: str) -> Any:
        if name not in self._known:
            if name in self._open or len(self._open) > MAX_DEPTH:
                raise self._refusal(f"${{{name}}}", "refers to itself")
            self._open.append(name)
            self._known[name] = self._scalar(name)
            self._open.pop()
        return self._known[name]

    def _scalar(self, name: str) -> Any:
        """A referenced value: mappings and lists are none, since one of them in another could grow without bound."""
        value: Any = self.root
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or isinstance(value, Mapping | list):
            raise self._refusal(f"${{{name}}}", "names no number and no text of the file")
        return self.resolve(value)

    def _refusal(self, text: str, rule: str) -> ConfigError:
        return ConfigError(self.path, text[:200], rule, self.remedy)
