"""Origin of a model: ``origin.json`` of an imported folder, kept in the checkpoints of runs that start from it.

It holds ``model_type``, ``config`` (the published config.json), ``idle`` (its keys without effect here, each with the
reason), ``ignored`` (keys ignored at the user's request) and ``licences`` (texts, stored as files of their own in a
folder).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.folder import ORIGIN, dump_json, read_json
from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json, read_bytes

MAX_BYTES = 2**20  # as JSON with licences: it is part of every checkpoint
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[A-Za-z0-9_.-]{0,40}", re.IGNORECASE)


def read(folder: Path) -> dict[str, Any]:
    """The origin of an imported folder; empty if it has none.

    Raises:
        ConfigError: it is unreadable
    """
    if not (folder / ORIGIN).is_file():
        return {}
    return check({**read_json(folder / ORIGIN), "licences": licences(folder)}, str(folder / ORIGIN))


def licences(folder: Path) -> dict[str, str]:
    """File name → licence text. README files are left out: they describe the weights in the folder."""
    files = (file for file in sorted(folder.iterdir()) if LICENCE.fullmatch(file.name) and file.is_file())
    return {file.name: read_bytes(folder, file.name, MAX_BYTES).decode(errors="replace") for file in files}


def check(origin: Any, where: str) -> dict[str, Any]:
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


def write(origin: Mapping[str, Any], folder: Path) -> None:
    """Write origin.json and the licences."""
    dump_json(folder / ORIGIN, {key: value for key, value in origin.items() if key != "licences"})
    write_licences(origin, folder)


def write_licences(origin: Mapping[str, Any], folder: Path) -> None:
    """Write the licences only."""
    for name, text in origin.get("licences", {}).items():
        (folder / name).write_text(text, encoding="utf-8")
