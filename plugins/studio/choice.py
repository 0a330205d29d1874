"""A model as it is chosen on the page: a preset and changes, each a path and the text after the ``=`` of an override.

It has three forms that mean the same: the composition, which is drawn; its text, which ``model=file`` takes; and the
overrides of ``blockwright train``.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from blockwright import registry
from blockwright.registry import ConfigError, presets
from blockwright.registry.command import quoted
from blockwright.registry.limits import check_values
from blockwright.training.configuration.composing import compose_config

PATH = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9][a-z0-9_]*){0,24}")
MOST = 200  # changes
LONGEST = 4000  # characters of a change


@dataclass(frozen=True)
class Choice:
    """A preset and the changes to it.

    Args:
        preset: its name
        changes: path in the composition → text, read as Hydra reads the value of an override; a text that is none is
            itself. At the path of a block it is the name of another block, and null for none

    Raises:
        ConfigError: no such preset, a path that can be none, an interpolation, or too much
    """

    preset: str
    changes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        presets.find(self.preset)
        if len(self.changes) > MOST:
            raise ConfigError("changes", len(self.changes), f"are more than {MOST}", "Start from a nearer preset")
        for path, text in self.changes.items():
            if not PATH.fullmatch(path):
                raise ConfigError("changes", path[:100], "is no path in a composition", "Write e.g. attention.n_heads")
            if len(text) > LONGEST or not text.isprintable():
                rule = f"must be a line of at most {LONGEST:,} characters"
                raise ConfigError(f"model.{path}", text[:100], rule, "Write less")
        check_values(dict(self.changes), "model")  # no ${…}: it could read the environment

    @functools.cached_property
    def composition(self) -> dict[str, Any]:
        """The composition: the preset's, with the changes.

        Raises:
            ConfigError: a change below a place that holds no mapping
        """
        model = base(self.preset)
        for path in self._in_order():
            _put(model, path, _chosen(path, _value(self.changes[path])))
        return model

    @property
    def text(self) -> str:
        """The composition as YAML, with a comment on where it comes from."""
        made = " ".join([self.preset, *self.overrides[1:]])
        body = yaml.safe_dump(self.composition, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        return f"# {made}\n{body}"

    @property
    def command(self) -> str:
        """The command line that trains it."""
        return " ".join(["blockwright train", *map(shlex.quote, self.overrides)])

    @functools.cached_property
    def overrides(self) -> list[str]:
        """The overrides of ``blockwright train``, the preset's first, then options of groups."""
        old, made = base(self.preset), [f"model={self.preset}"]
        blocks = [path for path in self._in_order() if path in registry.kinds()]
        made += [_of_a_group(path, self.changes[path], path in old) for path in blocks]
        old |= {path: {} for path in blocks}  # the option's own values, which are typed
        done: list[str] = []
        for path in self._in_order():
            if path in blocks or any(path.startswith(f"{above}.") for above in done):
                continue
            top = self._written_whole(path, old)
            done.append(top)
            made += self._of_a_value(top, old)
        return made

    def _in_order(self) -> list[str]:
        """The paths, outer ones first."""
        return sorted(self.changes, key=lambda path: path.count("."))

    def _written_whole(self, path: str, old: Mapping[str, Any]) -> str:
        """The outermost place at or above a path where the preset has a name, or none, instead of a mapping."""
        parts = path.split(".")
        for end in range(2 if parts[0] in registry.kinds() else 1, len(parts)):
            place = ".".join(parts[:end])
            if not isinstance(_at(old, place), dict | list) and _at(self.composition, place) is not None:
                return place
        return path

    def _of_a_value(self, path: str, old: Mapping[str, Any]) -> list[str]:
        """The overrides that put the value of a path: Hydra merges mappings, so another one first removes the old."""
        value, text = _at(self.composition, path), self.changes.get(path, "")
        below = any(other.startswith(f"{path}.") for other in self.changes)
        written = _written(value) if below or isinstance(value, dict) else text if _reads(text) else quoted_text(text)
        # ``++`` for a key that the configuration lacks. A model and its blocks are typed: they have all of
        # their keys.
        above, _, last = path.rpartition(".")
        typed = above in ("", *registry.kinds())
        holder = _at(old, above)
        present = last in holder if isinstance(holder, dict) else isinstance(holder, list)
        sign = "" if typed or present else "++"
        key = f"{sign}model.{path}"
        cleared = [f"{key}=null"] if isinstance(value, dict) and isinstance(_at(old, path), dict) else []
        return [*cleared, f"{key}={written}"]


@functools.lru_cache(maxsize=256)
def _base(preset: str) -> dict[str, Any]:
    model = presets.read(preset)
    if "vocab_size" not in model:  # the tokenizer's
        model["vocab_size"] = compose_config([f"model={preset}"]).model.vocab_size
    return model


def base(preset: str) -> dict[str, Any]:
    """The composition of a preset, with the vocabulary of the usual data where it has none; the caller may change it.

    Raises:
        ConfigError: there is no such preset, or its file cannot be read
    """
    return copy.deepcopy(_base(preset))


def _value(text: str) -> Any:
    """The value of a text, as Hydra reads it after an ``=``; a text that is none of one value is itself."""
    return _parsed(text) if _reads(text) else text


def _reads(text: str) -> bool:
    """Whether Hydra reads a text as one value."""
    try:
        _parsed(text)
    except (HydraException, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _override(text: str) -> Any:
    return OverridesParser.create().parse_override(f"key={text}")


def _parsed(text: str) -> Any:
    override = _override(text)
    if override.is_sweep_override() or override.value_type is None:
        raise ValueError(text)
    return override.value()


def _chosen(path: str, value: Any) -> Any:
    """The node of a block that is chosen for a part of the model."""
    return {"name": value} if path in registry.kinds() and isinstance(value, str) else value


def _put(model: dict[str, Any], path: str, value: Any) -> None:
    """Put a value into a composition; null for a part of the model removes it."""
    *above, last = path.split(".")
    if not above and value is None:
        model.pop(last, None)
        return
    place: Any = model
    for key in above:
        inner = place.get(key) if isinstance(place, dict) else place[_index(place, key, path)]
        if isinstance(inner, str) and inner != registry.INHERIT:
            inner = {"name": inner}
        elif inner is None and above[0] not in registry.kinds():
            inner = {}
        if not isinstance(inner, dict | list):
            raise ConfigError(f"model.{path}", value, f"there is nothing at model.{'.'.join(above)}", "Choose it first")
        place[key if isinstance(place, dict) else _index(place, key, path)] = inner
        place = inner
    place[last if isinstance(place, dict) else _index(place, last, path)] = value


def _index(items: list[Any], key: str, path: str) -> int:
    if not (key.isdecimal() and int(key) < len(items)):
        raise ConfigError(f"model.{path}", key, f"the list has {len(items)} entries", "Choose one of them")
    return int(key)


def _at(model: Any, path: str) -> Any:
    """The value at a path; None where there is none."""
    for key in path.split("."):
        if isinstance(model, list) and key.isdecimal():
            model = model[int(key)] if int(key) < len(model) else None
        else:
            model = model.get(key) if isinstance(model, dict) else None
    return model


def _of_a_group(kind: str, text: str, present: bool) -> str:
    if text == "null":
        return f"~model/{kind}"
    return f"{'' if present else '+'}model/{kind}={text}"


def _written(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_]\w*", value) and _value(value) == value else quoted_text(value)
    return json.dumps(value)


def quoted_text(text: str) -> str:
    """A text in Hydra's grammar."""
    return quoted(text) if "/" not in text else "'" + text.replace("'", "\\'") + "'"
