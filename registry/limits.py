"""How much a configuration may be before anything is made of it: a model from a stranger is data, and not too much.

Sizes are those of the whole, aliases and shared nodes spelt out: ten lines of YAML can stand for a billion values, and
so can a pickled dictionary that holds one list many times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from registry.errors import ConfigError

MAX_BYTES = 100_000  # of text; the largest preset here has a fiftieth of that
MAX_NODES = 10_000  # values, keys included
MAX_DEPTH = 32  # of nesting
MAX_INTEGER = 2**53  # which a float still holds; beyond it, no size of a tensor lies
MAX_TEXT = 100_000  # characters of one string

_OPENS = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
_Item = tuple[str, int, Any]  # path, depth, value


def read_text(file: Path, path: str) -> str:
    """The text of a configuration file, unless it is too long to be one.

    Args:
        file: where it lies
        path: where it is named, for the error

    Raises:
        ConfigError: it cannot be read as text, or is too long
    """
    try:
        with file.open("rb") as opened:  # a device or a pipe has no size to ask for
            data = opened.read(MAX_BYTES + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(path, str(file), f"cannot be read ({reason})", "Name a YAML file of a model") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(path, str(file), f"is longer than {MAX_BYTES:,} bytes", "Name a YAML file of a model")
    return text


def check_text(text: str, path: str) -> None:
    """Refuse YAML that is too long, too deep, or stands for too much.

    Args:
        text: YAML
        path: where it stands, for the error

    Raises:
        ConfigError
        yaml.YAMLError: it is no YAML
    """
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ConfigError(
            path, f"{text[:60]}…", f"is longer than {MAX_BYTES:,} bytes", "Use layout patterns and variants"
        )
    if _OPENS.search(text):  # known without the parser, which reads far ahead after each of them
        raise _too_deep(path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise _too_deep(path) from None
    if root is not None:
        _measure(root, path, {}, ())


def _measure(node: yaml.Node, path: str, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that a node stands for; measured once, however often it is named."""
    if id(node) in above:
        raise ConfigError(path, "…", "holds itself (an alias within its own anchor)", "Write the value out")
    if len(above) > MAX_DEPTH:
        raise _too_deep(path)
    if id(node) not in sizes:
        inner: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            inner = (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes[id(node)] = 1 + sum(_measure(part, path, sizes, (*above, id(node))) for part in inner)
        if sizes[id(node)] > MAX_NODES:
            raise _too_many(path)
    return sizes[id(node)]


def check_values(value: Any, path: str, *, data: bool = True) -> None:
    """Refuse plain values that are too many, too deep or too large, and what is no plain value.

    Args:
        value: dictionaries, lists and scalars
        path: where it stands, for the error
        data: whether it comes from outside and must say everything itself: ``${…}`` is then refused, for it could read
            the environment, or grow without end

    Raises:
        ConfigError
    """
    waiting: list[_Item] = [(path, 0, value)]
    seen = 0
    while waiting:
        seen += 1
        if seen > MAX_NODES:
            raise _too_many(path)
        where, depth, item = waiting.pop()
        if depth > MAX_DEPTH:
            raise _too_deep(path)
        if isinstance(item, Mapping):
            for key, inner in item.items():
                if isinstance(key, str):
                    _check_text_value(key, where, data)
                waiting.append((f"{where}.{key!s:.60}", depth + 1, inner))
        elif isinstance(item, list | tuple):
            if len(item) > MAX_NODES:
                raise _too_many(path)
            waiting += [(f"{where}.{i}", depth + 1, inner) for i, inner in enumerate(item)]
        elif isinstance(item, str):
            _check_text_value(item, where, data)
        elif isinstance(item, int) and abs(item) > MAX_INTEGER:
            raise ConfigError(where, f"{item:.3e}" if abs(item) < 10**300 else "…", _LARGE, "Write a smaller number")


_LARGE = f"is larger than any size or count can be ({MAX_INTEGER:,})"


def _check_text_value(text: str, path: str, data: bool) -> None:
    if len(text) > MAX_TEXT:
        raise ConfigError(path, f"{text[:60]}…", f"is longer than {MAX_TEXT:,} characters", "Write less")
    if data and "${" in text:
        rule = "refers to something else, and a model that comes as text or data says everything itself"
        raise ConfigError(path, text[:200], rule, "Write the value out; ${…} works in the project's own conf/")


def _too_many(path: str) -> ConfigError:
    rule = f"stands for more than {MAX_NODES:,} values, its aliases spelt out"
    return ConfigError(path, "…", rule, "Use fewer aliases (*name)")


def _too_deep(path: str) -> ConfigError:
    return ConfigError(path, "…", f"is nested more than {MAX_DEPTH} deep", "No model needs that: write it flatter")
