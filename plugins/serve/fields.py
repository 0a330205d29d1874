"""The fields of a request: each is read once by its type, and what nothing has read is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.plugins.serve.refusal import RefusedError, shown, shown_name
from blockwright.registry.schema import conforms, fault

ABOUT_THE_SENDER = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})

# Field → the values that change nothing, which clients send by default. No other value is supported; null always is.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class Fields:
    """The fields of a JSON object, taken one by one.

    Args:
        values: the object
        where: its place in the request: ``messages.0.``
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.left, self.where = dict(values), where

    def take(self, name: str, hint: Any, default: Any = None) -> Any:
        """The value of a field; ``default`` where it is missing or null.

        Args:
            name: of the field
            hint: its type, with bounds as in registry/ranges.py

        Raises:
            RefusedError: it is of another type, or out of its bounds
        """
        value = self.left.pop(name, None)
        if value is None:
            return default
        if not conforms(value, hint):
            raise self.refuse(name, value, fault(value, hint))
        return value

    def check_count(self, name: str, most: int) -> None:
        """Refuse a list that is longer than any that can be answered, before each of its items is looked at.

        Raises:
            RefusedError
        """
        value = self.left.get(name)
        if isinstance(value, list) and len(value) > most:
            raise self.refuse(name, value[:2], f"has {len(value):,} items, and at most {most:,} can be read")

    def need(self, name: str, hint: Any) -> Any:
        """As ``take``, of a field that must be present."""
        if (value := self.take(name, hint)) is None:
            raise self.refuse(name, None, "is required")
        return value

    def refuse(self, name: str, value: Any, rule: str, code: str = "invalid_value") -> RefusedError:
        """The refusal of a field's value."""
        return RefusedError(400, f"{self.where}{name} = {shown(value)}: {rule}", f"{self.where}{name}", code)

    def finish(self, neutral: Mapping[str, tuple[Any, ...]] = WITHOUT_EFFECT) -> None:
        """Refuse the fields that are left, so that none is silently without effect.

        Args:
            neutral: field → the values that change nothing

        Raises:
            RefusedError
        """
        for name, value in self.left.items():
            if value is not None and name not in ABOUT_THE_SENDER and value not in neutral.get(name, ()):
                raise self.refuse(shown_name(name), value, "is not supported by this server", "unsupported_parameter")
