"""What the bytes of a checkpoint should be: a SHA-256 that travels with them, and is checked before they are believed.

A checkpoint in one file carries its digest in the file's own comment: a file of ``torch.save`` is a zip, whose last
record may end in one. So file and digest appear, move and vanish together, and every reader of such files reads on.
A checkpoint that is a folder has a ``manifest.json`` of every file that was written into it. What else lies there (a
note, ``.DS_Store``, the ``.nfs…`` of a file that is still open elsewhere) is ignored.

A digest tells damage from health, not a friend from a stranger: whoever writes a file can seal it.
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

MANIFEST = "manifest.json"
FORMAT = "blockwright-checkpoint-1"
_TRAILER = re.compile(rb"blockwright-sha256:([0-9a-f]{64})\Z")
_TRAILER_BYTES = len(b"blockwright-sha256:") + 64
_END = b"PK\x05\x06"  # of a zip: this record, 22 bytes long, the last two of which count the comment behind it
_END_BYTES = 22
_CHUNK = 1 << 22
_STRAY = re.compile(
    r"\.nfs[0-9a-f]|\._|\.DS_Store\Z|Thumbs\.db\Z|desktop\.ini\Z"
)  # not ours, here today and gone tomorrow

Digests = Mapping[str, Mapping[str, int | str]]  # a file's name within its folder → its "bytes" and "sha256"


class Damaged(ValueError):  # noqa: N818 - a state of a file
    """A checkpoint that is not what was written.

    Args:
        path: the file or folder
        reason: what was found, as the end of a sentence that begins with the path
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} {reason}")


class Sealing:
    """A file-like object that ``torch.save`` writes a zip to, and that ends it with the digest of all before.

    Args:
        file: opened for writing in binary
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""

    def write(self, data: bytes | memoryview) -> int:
        """Pass data on, the last two bytes held back: they will have to count the comment."""
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
        """End the file.

        Raises:
            ValueError: what was written is no zip, or has a comment of its own
        """
        if self._held != b"\0\0":
            raise ValueError("only a zip without a comment can be sealed")
        self._pass(_TRAILER_BYTES.to_bytes(2, "little"))
        self._file.write(b"blockwright-sha256:" + self._digest.hexdigest().encode())

    def _pass(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def seal_folder(folder: Path, digests: Digests | None = None) -> None:
    """Write the manifest of a folder, and everything that it names to the disk.

    Args:
        folder: all of whose files are written
        digests: of its files; null to read and digest every file that the folder holds now, except those that file
            servers and desktops leave (``.nfs…``, ``.DS_Store``) and may take away again

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
    """Names of the files below a folder that belong to a checkpoint, its manifest excepted.

    Raises:
        Damaged: one of them is a link
    """
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.name == MANIFEST or _STRAY.match(file.name):
            continue
        if file.is_symlink():
            raise Damaged(folder, f"is no checkpoint: {name} is a link")
        if file.is_file():
            found.append(name)
    return found


def digests_of(folder: Path, names: Iterable[str]) -> Digests:
    """Size and SHA-256 of some files of a folder, as its manifest holds them."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def sync(path: Path) -> None:
    """Have the disk hold what the file system knows of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(path: Path) -> bool:
    """Hold a checkpoint to its digest. The answer is remembered for as long as the file's time and size are the same.

    Returns:
        whether it has one; a file of another program, or of an older version, has none

    Raises:
        Damaged: it is not what was written
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
        told = _TRAILER.search(file.read())
        file.seek(max(0, size - _END_BYTES))
        end = file.read()
    if told:
        if _sha256(path, size - _TRAILER_BYTES) != told[1].decode():
            raise Damaged(path, "is damaged: its bytes are not those that were written")
        return True
    if starts_as_zip and not (end.startswith(_END) and end.endswith(b"\0\0")):
        raise Damaged(path, "is damaged: it is cut short, or its end is not what was written")
    return False


def read_manifest(folder: Path) -> Digests:
    """What a sealed folder says of each of its files, without looking at them.

    Raises:
        Damaged: the manifest is not what was written
        OSError: it cannot be read
    """
    try:
        text = (folder / MANIFEST).read_text()
        files = dict(json.loads(text)["files"])
        whole = text == _canonical(files) and all(_is_entry(name, told) for name, told in files.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(folder, f"is damaged: its {MANIFEST} is not what was written")
    return files


def check_files(folder: Path, digests: Digests) -> bool:
    """Hold files of a folder to their digests; other files there are nobody's concern. Remembered as in ``check``.

    Args:
        folder: a checkpoint
        digests: of ``read_manifest``, or a part of it

    Returns:
        True

    Raises:
        Damaged: a file is missing, a link, or not what was written
        OSError: one cannot be read
    """
    for name, wanted in sorted(digests.items()):
        file = folder / name
        if any(path.is_symlink() for path in (file, *file.parents[: len(PurePosixPath(name).parts) - 1])):
            raise Damaged(folder, f"is no checkpoint: {name} is a link")
        if not file.is_file():
            raise Damaged(folder, f"is damaged: {name} is missing")
        status = file.stat()
        known = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if status.st_size != wanted["bytes"] or _remembered_sha256(file, known) != wanted["sha256"]:
            raise Damaged(folder, f"is damaged: the bytes of {name} are not those that were written")
    return True


def _is_entry(name: str, told: Mapping[str, int | str]) -> bool:
    path = PurePosixPath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return is_inside and set(told) == {"bytes", "sha256"}


@functools.lru_cache(maxsize=4096)
def _remembered_sha256(file: Path, status: tuple[int, ...]) -> str:
    return _sha256(file)


def _canonical(files: Digests) -> str:
    return json.dumps({"files": files, "format": FORMAT}, sort_keys=True, separators=(",", ":"))


def _sha256(path: Path, length: int | None = None) -> str:
    """Of the first ``length`` bytes of a file, or of all."""
    digest, left = hashlib.sha256(), path.stat().st_size if length is None else length
    with path.open("rb", buffering=0) as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
