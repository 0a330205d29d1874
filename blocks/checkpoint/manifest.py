"""SHA-256 digests of checkpoints, stored with them and checked before they are read.

A single-file checkpoint carries its digest in the file's comment: a file of ``torch.save`` is a zip, whose last record
may end in a comment. So file and digest are created, moved and deleted together, and other readers are unaffected.
A checkpoint folder has a ``manifest.json`` of every file written to it. Other files in it (a note, ``.DS_Store``, the
``.nfs…`` of a file that is still open elsewhere) are ignored.

The digest detects corruption; it does not authenticate the author.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from blockwright.registry.folder import MAX_JSON_BYTES, parse_json
from blockwright.registry.limits import open_plain

MANIFEST = "manifest.json"
FORMAT = "blockwright-checkpoint-1"
_TRAILER = re.compile(rb"blockwright-sha256:([0-9a-f]{64})\Z")
_TRAILER_BYTES = len(b"blockwright-sha256:") + 64
_END = b"PK\x05\x06"  # zip end record: 22 bytes, the last two count the comment after it
_END_BYTES = 22
_CHUNK = 1 << 22
_STRAY = re.compile(
    r"\.nfs[0-9a-f]|\._|\.DS_Store\Z|Thumbs\.db\Z|desktop\.ini\Z"
)  # files of the system, which come and go

Digests = Mapping[str, Mapping[str, int | str]]  # a file's name within its folder → its "bytes" and "sha256"


class Damaged(ValueError):  # noqa: N818 - a state of a file
    """A checkpoint that differs from what was written.

    Args:
        path: the file or folder
        reason: what was found, continuing a sentence that begins with the path
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} {reason}")


class Sealing:
    """A file-like object for ``torch.save`` that appends the digest of everything written before.

    Args:
        file: opened for writing in binary
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""

    def write(self, data: bytes | memoryview) -> int:
        """Write data through, holding back the last two bytes, which will count the comment."""
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self._pass(self._held)
            self._pass(view[:-2])
            self._held = bytes(view[-2:])
        else:
            joined = self._held + bytes(view)
            self._pass(joined[:-2])
            self._held = joined[-2:]
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> None:
        """Write the digest and end the file.

        Raises:
            ValueError: what was written is not a zip, or already has a comment
        """
        if self._held != b"\0\0":
            raise ValueError("only a zip without a comment can be sealed")
        self._pass(_TRAILER_BYTES.to_bytes(2, "little"))
        self._file.write(b"blockwright-sha256:" + self._digest.hexdigest().encode())

    def _pass(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def seal_folder(folder: Path, digests: Digests | None = None) -> None:
    """Write the manifest of a folder, and sync all files it names to disk.

    Args:
        folder: with all its files written
        digests: of its files; null to digest every file in the folder, except those that file servers and desktops
            leave (``.nfs…``, ``.DS_Store``) and may remove again

    Raises:
        OSError: it cannot be written
    """
    files = digests_of(folder, files_of(folder)) if digests is None else dict(digests)
    manifest = folder / MANIFEST
    manifest.write_text(_canonical(files))
    for file in [manifest, *(folder / name for name in files)]:
        sync(file)
    sync(folder)


def files_of(folder: Path) -> list[str]:
    """Names of the files below a folder that belong to a checkpoint, without its manifest.

    Raises:
        Damaged: a file is a link
    """
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.name == MANIFEST or _STRAY.match(file.name):
            continue
        if file.is_symlink():
            raise Damaged(folder, f"is not a checkpoint: {name} is a link")
        if file.is_file():
            found.append(name)
    return found


def digests_of(folder: Path, names: Iterable[str]) -> Digests:
    """Size and SHA-256 of files in a folder, in the format of its manifest."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(path: Path) -> bool:
    """Verify a checkpoint's digest. The result is cached while the file's time and size are unchanged.

    Returns:
        whether it has one; files of other programs or older versions have none

    Raises:
        Damaged: it differs from what was written
        OSError: it cannot be read
    """
    if path.is_dir():
        return (path / MANIFEST).is_file() and check_files(path, read_manifest(path))
    status = path.stat()
    return _check_file(path, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))


@functools.lru_cache(maxsize=64)
def _check_file(path: Path, status: tuple[int, ...]) -> bool:
    size = status[-1]
    with path.open("rb") as file:
        starts_as_zip = file.read(2) == b"PK"
        file.seek(max(0, size - _TRAILER_BYTES))
        trailer = _TRAILER.search(file.read())
        file.seek(max(0, size - _END_BYTES))
        end = file.read()
    if trailer:
        if _sha256(path, size - _TRAILER_BYTES) != trailer[1].decode():
            raise Damaged(path, "is damaged: its bytes do not match its digest")
        return True
    if starts_as_zip and not (end.startswith(_END) and end.endswith(b"\0\0")):
        raise Damaged(path, "is damaged: it is truncated, or its end was changed")
    return False


def read_manifest(folder: Path) -> Digests:
    """The manifest of a sealed folder; its files are not read.

    Raises:
        Damaged: the manifest differs from what was written
        OSError: it cannot be read
    """
    try:
        with open_plain(folder / MANIFEST) as opened:
            text = opened.read(MAX_JSON_BYTES).decode()
        files = dict(parse_json(text, MANIFEST)["files"])
        whole = text == _canonical(files) and all(_is_entry(name, entry) for name, entry in files.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(folder, f"is damaged: its {MANIFEST} was changed")
    return files


def check_files(folder: Path, digests: Digests) -> bool:
    """Verify files of a folder against their digests, ignoring other files. Cached as in ``check``.

    Args:
        folder: a checkpoint
        digests: from ``read_manifest``, or a part of it

    Returns:
        True

    Raises:
        Damaged: a file is missing, a link, or differs from what was written
        OSError: a file cannot be read
    """
    for name, wanted in sorted(digests.items()):
        file = folder / name
        if any(path.is_symlink() for path in (file, *file.parents[: len(PurePosixPath(name).parts) - 1])):
            raise Damaged(folder, f"is not a checkpoint: {name} is a link")
        if not file.is_file():
            raise Damaged(folder, f"is damaged: {name} is missing")
        status = file.stat()
        known = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if status.st_size != wanted["bytes"] or _remembered_sha256(file, known) != wanted["sha256"]:
            raise Damaged(folder, f"is damaged: the bytes of {name} do not match its digest")
    return True


def _is_entry(name: str, entry: Mapping[str, int | str]) -> bool:
    path = PurePosixPath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return is_inside and set(entry) == {"bytes", "sha256"}


@functools.lru_cache(maxsize=4096)
def _remembered_sha256(file: Path, status: tuple[int, ...]) -> str:
    return _sha256(file)


def _canonical(files: Digests) -> str:
    return json.dumps({"files": files, "format": FORMAT}, sort_keys=True, separators=(",", ":"))


def _sha256(path: Path, length: int | None = None) -> str:
    """SHA-256 of the first ``length`` bytes of a file, or of all."""
    digest, left = hashlib.sha256(), path.stat().st_size if length is None else length
    with path.open("rb", buffering=0) as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
