"""A folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from registry import ConfigError

ORIGIN = "origin.json"  # in an imported folder: the model_type and config.json it came from


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, which takes its place at the end; after an error nothing is left of it.

    Raises:
        ConfigError: ``out`` is there and not empty, or cannot be written
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError("OUT", str(out), "is there already", "Name a folder that does not exist, or an empty one")
    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ConfigError(
            "OUT", str(out), f"cannot be written ({reason})", "Name another folder, or make room"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def dump_json(path: Path, values: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
