"""Folders of checkpoints: their JSON files, their origin and licences, and SHA-256 digests of all they hold.

Digests are stored with a checkpoint and checked before it is read. A single-file checkpoint carries its digest in the
file's comment: a file of ``torch.save`` is a zip, whose last record may end in a comment. So file and digest are
created, moved and deleted together, and other readers are unaffected. A checkpoint folder has a ``manifest.json`` of
every file written to it. Other files in it (a note, ``.DS_Store``, the ``.nfs…`` of a file that is still open
elsewhere) are ignored.

The digest detects corruption; it does not authenticate the author.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from blockwright.registry import ConfigError, folder
from blockwright.registry.command import quoted
from blockwright.registry.errors import os_error_of
from blockwright.registry.folder import MAX_JSON_BYTES, parse_json, read_bytes, replaced
from blockwright.registry.limits import open_plain

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
