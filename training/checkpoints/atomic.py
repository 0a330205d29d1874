"""A checkpoint appears at its path whole or not at all, and the one before stays until the new one has been verified.

It is written beside its place (a rename is atomic within one file system only), brought to the disk, read back, and
renamed. ``last.ckpt`` keeps its predecessor as ``last.previous.ckpt``. A kill leaves a ``.partial`` at worst, which the
next start removes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from blocks import manifest
from registry import ConfigError
from training.checkpoints.find import LAST, PREVIOUS

ABANDONED_S = 24 * 3600  # after which a partial of another machine, whose processes cannot be seen, is nobody's


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Save a checkpoint as one sealed file.

    Raises:
        ConfigError: the disk is full, or another reason why it cannot be written; what was at ``path`` is intact
    """
    partial = partial_of(path)
    with refused_if_unwritable(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            sealing = manifest.Sealing(file)
            torch.save(checkpoint, sealing)  # type: ignore[arg-type] # it asks for write and flush only
            sealing.seal()
            file.flush()
            os.fsync(file.fileno())
            _forget_cached(file.fileno())
        put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Verify what has been written, and give it its name.

    Args:
        partial: a sealed file or folder, in the folder of ``path``
        path: its name; what has this name is kept as the previous one if it is a ``last.ckpt``, else replaced

    Raises:
        Damaged: it is not what was written; nothing has been renamed
        OSError
    """
    manifest.check(partial)
    old = path.with_name(f".{path.name}.{_owner()}.old")
    if path.exists() and (path.name == LAST or path.is_dir() or partial.is_dir()):
        _set_aside(path, old, link=path.is_file() and partial.is_file())
    os.replace(partial, path)
    if path.name == LAST and old.exists():
        previous = path.with_name(PREVIOUS)
        if previous.is_dir() or old.is_dir():  # never half of a folder under its name
            _set_aside(previous, trash := previous.with_name(f".{PREVIOUS}.{_owner()}.old"))
            os.replace(old, previous)
            _remove(trash)
        else:
            os.replace(old, previous)
    _remove(old)
    manifest.sync(path.parent)


def _set_aside(path: Path, old: Path, link: bool = False) -> None:
    """Give what is at ``path`` another name: besides its own, so that at no time there is nothing, or instead of it."""
    _remove(old)
    if not path.exists():
        return
    if link:
        try:
            os.link(path, old)
            return
        except OSError:  # a file system without hard links
            pass
    os.replace(path, old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it has its name: beside it, with the writer's machine and process."""
    return path.with_name(f".{path.name}.{_owner()}.partial")


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def refused_if_unwritable(path: Path, partial: Path, owns: bool = True) -> Iterator[None]:
    """Turn what a full or broken disk raises into a refusal, and leave nothing of a checkpoint that is not whole.

    Args:
        path: of the checkpoint
        partial: where it is being written
        owns: whether this process is the one to remove what is left there

    Raises:
        ConfigError
    """
    try:
        yield
    except manifest.Damaged as error:
        reason = f"what was read back is not what was written: {error.reason}"
        raise ConfigError("checkpoint", str(path), reason, "Look at the disk, or set paths.log_dir elsewhere") from None
    except (OSError, RuntimeError) as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OSError):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        rule = f"cannot be written ({found.strerror or found})"
        remedy = "Make room or set paths.log_dir elsewhere; checkpoints written before are intact"
        raise ConfigError("checkpoint", str(path), rule, remedy) from None
    finally:
        if owns:
            _remove(partial)


def _forget_cached(descriptor: int) -> None:
    """Let the file be read back from the disk and not from memory, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def clean(folder: Path) -> list[Path]:
    """Remove what killed processes have left of the runs in a folder.

    A ``.old`` is a good checkpoint that was about to be replaced: it gets its place back where nothing has taken it.

    Returns:
        what has been removed or put back
    """
    return [path for checkpoints in folder.glob("*/checkpoints") for path in clean_folder(checkpoints)]


def clean_folder(checkpoints: Path) -> list[Path]:
    """The same in one folder of checkpoints."""
    found = [path for path in checkpoints.glob(".*") if _is_abandoned(path)]
    for path in found:
        place = path.with_name(LAST)
        if path.suffix == ".old" and path.name.startswith(f".{LAST}.") and not place.exists():
            os.replace(path, place)
        _remove(path)
    return found


def _is_abandoned(path: Path) -> bool:
    owner = re.match(r"\..+?-(\d+)\.(?:partial|old)(?:\.|$)", path.name)  # what a strategy writes there may add to it
    if owner is None:
        return False
    if path.name[: owner.start(1) - 1].endswith(f".{socket.gethostname()}"):
        return not _is_alive(int(owner[1]))
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
