"""Limits on the size of a configuration, checked before anything is built, since models may be untrusted.

Sizes count expanded aliases and shared nodes: ten lines of YAML can stand for a billion values, and so can a pickled
dictionary that holds one list many times.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from omegaconf._utils import get_yaml_loader

from blockwright.registry.errors import ConfigError

MAX_BYTES = 100_000  # of text; 50 times the largest preset here
MAX_NODES = 10_000  # values, keys included
MAX_DEPTH = 32  # of nesting
MAX_INTEGER = 2**53  # exact in a float, and larger than any tensor
MAX_TEXT = 100_000  # characters of one string
KERNEL = (("/", "proc"), ("/", "sys"))  # folders whose files are on no disk

_OPENS = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
_Item = tuple[str, int, Any]  # path, depth, value


def read_text(file: Path, path: str, remedy: str = "Name a YAML file of a model") -> str:
    """The text of a configuration file of limited size.

    Args:
        file: the file
        path: configuration path that names it, for the error message
        remedy: for the same

    Raises:
        ConfigError: unreadable, no plain file, or too long
    """
    try:
        return read_plain(file, path, remedy).decode()
    except UnicodeDecodeError:
        raise ConfigError(path, str(file), "cannot be read (it is not UTF-8)", remedy) from None


def read_plain(file: Path, path: str, remedy: str, most: int = MAX_BYTES) -> bytes:
    """The contents of a plain file of limited size.

    Args:
        file, path, remedy: as in ``read_text``
        most: bytes

    Raises:
        ConfigError: unreadable, no plain file, or too long
    """
    try:
        with open_plain(file) as opened:
            long = os.fstat(opened.fileno()).st_size > most
            data = b"" if long else opened.read(most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(path, str(file), f"cannot be read ({reason})", remedy) from None
    if long or len(data) > most:
        raise ConfigError(path, str(file), f"is longer than {most:,} bytes", remedy)
    return data


def open_plain(file: Path) -> BinaryIO:
    """Open a file that lies on a disk: no device, no pipe, which might never end, and nothing that the kernel makes up,
    such as the environment in /proc.

    Raises:
        OSError: it cannot be opened
        ValueError: it is none
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    opened = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if opened is None:
        os.close(descriptor)
        raise ValueError("it is no plain file")
    if _place(descriptor, file).parts[:2] in KERNEL:
        opened.close()
        raise ValueError("it is no file on a disk")
    return opened


def _place(descriptor: int, file: Path) -> Path:
    """Where an open file lies. Its path is asked only where no /proc says it: a link in it may have changed since."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return Path(os.path.realpath(file))


def check_text(text: str, path: str) -> None:
    """Refuse YAML that is too long, too deep, or expands to too many values.

    Args:
        text: YAML
        path: configuration path, for the error message

    Raises:
        ConfigError
        yaml.YAMLError: not YAML
    """
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ConfigError(
            path, f"{text[:60]}…", f"is longer than {MAX_BYTES:,} bytes", "Use layout patterns and variants"
        )
    if _OPENS.search(text):  # checked before parsing: the parser reads far ahead after each
        raise _too_deep(path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise _too_deep(path) from None
    if root is not None:
        _measure(root, path, {}, ())


def load_text(text: str) -> Any:
    """The values of YAML that ``check_text`` has passed, read as OmegaConf does (``1e-3`` is a number), except that
    ``${…}`` is not parsed: OmegaConf's parser takes seconds for a line of them.

    Raises:
        yaml.YAMLError: a key stands twice, or a value is of no plain type
    """
    return yaml.load(text, Loader=get_yaml_loader())  # a SafeLoader


def _measure(node: yaml.Node, path: str, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Number of values that a node expands to; measured once per node."""
    if id(node) in above:
        raise ConfigError(path, "…", "contains itself (an alias within its own anchor)", "Write the value out")
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
    """Refuse plain values that are too many, too deep or too large, and any other types.

    Args:
        value: dictionaries, lists and scalars
        path: configuration path, for the error message
        data: whether it comes from outside: ``${…}`` is then refused, since it could read the environment, or grow
            without bound

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


_LARGE = f"is larger than any possible size or count ({MAX_INTEGER:,})"


def _check_text_value(text: str, path: str, data: bool) -> None:
    if len(text) > MAX_TEXT:
        raise ConfigError(path, f"{text[:60]}…", f"is longer than {MAX_TEXT:,} characters", "Write less")
    if data and "${" in text:
        rule = "is an interpolation, which a model given as text or data may not contain"
        raise ConfigError(path, text[:200], rule, "Write the value out; ${…} works in the project's own conf/")


def _too_many(path: str) -> ConfigError:
    rule = f"expands to more than {MAX_NODES:,} values"
    return ConfigError(path, "…", rule, "Use fewer aliases (*name)")


def _too_deep(path: str) -> ConfigError:
    return ConfigError(path, "…", f"is nested more than {MAX_DEPTH} deep", "No model needs that: write it flatter")
