"""Checkpoint folders: JSON files of limited size, and folders written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwright.registry import ConfigError, folder
from blockwright.registry.errors import os_error_of
from blockwright.registry.replacing import replaced
from blockwright.registry.words import quoted

ORIGIN = "origin.json"  # of an imported folder, see blocks/checkpoint/origin.py


def start_from(start: Path) -> list[str]:
    """Overrides by which a run starts from the weights in a folder, with their tokenizer if it has one."""
    words = [f"init_from={quoted(start)}", "model=pretrained"]
    file = start / "tokenizer.json"
    return [*words, "data/tokenizer=pretrained", f"data.tokenizer.file={quoted(file)}"] if file.is_file() else words


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written, before work whose result would be lost.

    Raises:
        ConfigError: ``out`` exists and is not empty
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError("OUT", str(out), "exists already", "Name a folder that does not exist, or an empty one")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, renamed to ``out`` at the end and removed after an error.

    Raises:
        ConfigError: ``out`` exists and is not empty, or cannot be written
    """
    check_out(out)
    try:
        with replaced(out) as temporary:
            temporary.mkdir(parents=True)
            yield temporary
    except (OSError, RuntimeError) as raised:
        if (error := os_error_of(raised)) is None:
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ConfigError(
            "OUT", str(out), f"cannot be written ({reason})", "Name another folder, or make room"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a folder that holds a mapping.

    Raises:
        ConfigError: missing or unreadable
    """
    values = folder.read_json(path.parent, path.name)
    if not isinstance(values, dict):
        raise ConfigError(str(path), type(values).__name__, "must hold a mapping", "Fetch the file again")
    return values


def dump_json(path: Path, values: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
