"""A full disk: one message, whatever was being written, and whichever library wrote it."""

from __future__ import annotations

import errno

from blockwright.registry.errors import ConfigError

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
