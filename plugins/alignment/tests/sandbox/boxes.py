"""The strongest box that this system allows."""

from __future__ import annotations

from blockwright.plugins.alignment.sandbox.box import Box, BoxError


def strongest(seconds: int = 1, memory_mb: int = 256, file_mb: int = 2) -> Box:
    """With walls where bubblewrap works, else the weaker one."""
    box = Box(seconds, memory_mb, file_mb)
    try:
        box.check()
    except BoxError:
        return Box(seconds, memory_mb, file_mb, weaker=True)
    return box
