"""Checkpoint folders: JSON files of limited size, and folders written atomically."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockwright.registry import ConfigError, folder
from blockwright.registry.command import quoted
from blockwright.registry.errors import os_error_of
from blockwright.registry.folder import parse_json, read_bytes, replaced

ORIGIN = "origin.json"  # of an imported folder


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


# --- origin of a model ------------------------------------------------------------------------------------------------


MAX_BYTES = 2**20  # as JSON with licences: it is part of every checkpoint
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[A-Za-z0-9_.-]{0,40}", re.IGNORECASE)


def origin_of(folder: Path) -> dict[str, Any]:
    """The origin of an imported folder; empty if it has none.

    Raises:
        ConfigError: it is unreadable
    """
    if not (folder / ORIGIN).is_file():
        return {}
    return check_origin({**read_json(folder / ORIGIN), "licences": licences(folder)}, str(folder / ORIGIN))


def licences(folder: Path) -> dict[str, str]:
    """File name → licence text. README files are left out: they describe the weights in the folder."""
    files = (file for file in sorted(folder.iterdir()) if LICENCE.fullmatch(file.name) and file.is_file())
    return {file.name: read_bytes(folder, file.name, MAX_BYTES).decode(errors="replace") for file in files}


def check_origin(origin: Any, where: str) -> dict[str, Any]:
    """Validate an origin from a file or a checkpoint: plain JSON of limited size.

    Raises:
        ConfigError: at the path ``where``
    """
    remedy = "Import the checkpoint again, or remove it from the folder"
    try:
        text = json.dumps(origin)
    except (TypeError, ValueError, RecursionError):
        raise ConfigError(where, type(origin).__name__, "must be plain data", remedy) from None
    if len(text) > MAX_BYTES:
        raise ConfigError(where, f"{len(text):,} bytes", f"is longer than {MAX_BYTES:,} bytes", remedy)
    found = parse_json(text, where)
    if not isinstance(found, dict) or not isinstance(found.get("config", {}), dict):
        raise ConfigError(where, type(found).__name__, "must hold a mapping, with another as config", remedy)
    texts = found.get("licences", {})
    if not isinstance(texts, dict) or not all(LICENCE.fullmatch(k) and isinstance(v, str) for k, v in texts.items()):
        raise ConfigError(where, "licences", "must map names of licences to texts", remedy)
    return found


def write_origin(origin: Mapping[str, Any], folder: Path) -> None:
    """Write origin.json and the licences."""
    dump_json(folder / ORIGIN, {key: value for key, value in origin.items() if key != "licences"})
    write_licences(origin, folder)


def write_licences(origin: Mapping[str, Any], folder: Path) -> None:
    """Write the licences only."""
    for name, text in origin.get("licences", {}).items():
        (folder / name).write_text(text, encoding="utf-8")
