"""Errors of the user: path, value, rule and remedy, without a traceback; those of a missing package name its extra."""

from __future__ import annotations

import difflib
import errno
import importlib.util
from collections.abc import Iterable
from typing import Any

REFUSED = 64  # exit code for a refused configuration (EX_USAGE of sysexits.h)


class ConfigError(ValueError):
    """An invalid configuration, refused before anything is built.

    Args:
        path: where the value is, as written on the command line (``model.attention.n_heads``)
        value: the value found
        rule: the violated rule, as a sentence without a full stop
        remedy: what to write instead
    """

    def __init__(self, path: str, value: Any, rule: str, remedy: str) -> None:
        self.path, self.value, self.rule, self.remedy = path, value, rule, remedy
        super().__init__(path, value, rule, remedy)

    def __str__(self) -> str:
        return f"{self.path} = {self.value!r}: {self.rule}. {self.remedy}"

    def render(self) -> str:
        """The error as printed in a terminal."""
        value = "null" if self.value is None else str(self.value)
        value = value if len(value) <= 200 else f"{value[:200]}…"
        return f"error: {self.path} = {value}\n  rule:   {self.rule}\n  remedy: {self.remedy}"


class BlockError(ValueError):
    """Raised by a block's constructor about its own parameter; the builder turns it into a ConfigError with the path.

    Args:
        parameter: name of the offending parameter of the block
        value: what was passed
        rule: the violated rule, as a sentence without a full stop
        remedy: what to write instead
    """

    def __init__(self, parameter: str, value: Any, rule: str, remedy: str) -> None:
        self.parameter, self.value, self.rule, self.remedy = parameter, value, rule, remedy
        super().__init__(parameter, value, rule, remedy)

    def __str__(self) -> str:
        return f"{self.parameter} = {self.value!r}: {self.rule}. {self.remedy}"


# A path that is not the user's, is a file where a folder is due or the reverse, or cannot be one at all.
NO_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def refused_path(error: BaseException, remedy: str) -> ConfigError | None:
    """A ConfigError for an OSError about a path (``NO_PATH``); None for other errors."""
    if not isinstance(error, OSError) or not error.filename or error.errno not in NO_PATH:
        return None
    return ConfigError("path", error.filename, f"cannot be read or written ({error.strerror})", remedy)


def did_you_mean(word: Any, known: Iterable[str], otherwise: str = "") -> str:
    """A remedy: the nearest known name, if any is near, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    listing = f"Known: {', '.join(names)}" if names else otherwise
    return f"{hint}{listing}".strip()


# --- a full disk: one message, whatever was being written, and whichever library wrote it ---


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def os_error_of(error: BaseException) -> OSError | None:
    """The OSError that an exception is or was raised from, as torch does with those of a file; None without one."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return found


def refusal_of_full(error: BaseException) -> ConfigError | None:
    """The ConfigError for an exception that says that a disk, or a quota of it, is full; None for others."""
    found = os_error_of(error)
    if found is None or found.errno not in FULL:
        return None
    remedy = "Make room, or write to a folder on another disk; checkpoints written before are intact"
    return ConfigError("disk", found.filename or "…", f"cannot be written ({found.strerror})", remedy)


def has_package(name: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def require(extra: str, *packages: str, path: str, value: Any = None, otherwise: str = "") -> None:
    """Refuse a setting that needs packages which are not installed.

    Args:
        extra: that installs them
        packages: names to import
        path, value: of the setting
        otherwise: alternative for the user: ``or train on your own files: data=text``

    Raises:
        ConfigError: one of the packages is missing
    """
    missing = [name for name in packages if not has_package(name)]
    if missing:
        rule = f"needs a package that is not installed ({', '.join(missing)})"
        raise ConfigError(path, value, rule, f"pip install 'blockwright[{extra}]'{otherwise and f', {otherwise}'}")
