"""Files of a folder that may be untrusted (a run's, a sweep's, a checkpoint's): read as data, and replaced whole.

Every text file is read here, as data: a plain file within the folder, of limited size, depth and number of values. No
interpolation is resolved, so that nothing of the environment is read. A file that is missing, or is not what it should
be, is a ConfigError, which is a ValueError: where a damaged file counts as none, catch that.

A file or a folder is replaced atomically: a reader sees the old content or the new one, even if the writer is killed.
Other files only grow; whatever ends their writer, what was there before stays.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blockwright.registry.errors import ConfigError
from blockwright.registry.limits import MAX_BYTES, MAX_DEPTH, MAX_TEXT, check_text, check_values, load_text, read_plain

MAX_JSON_BYTES = 32_000_000  # the index of the largest known checkpoint has a third of it
MAX_FILE_BYTES = 256_000_000  # of a text that is copied or given to a library; the largest known vocabulary: 35 MB
MAX_JSON_NODES = 4_000_000
REMEDY = "Fetch the file again, or do not trust this folder"


def place(folder: Path, name: str) -> Path:
    """The path of a file of a folder, which may be a link into Hugging Face's cache, as its downloads are.

    Args:
        folder: of the file
        name: relative to the folder

    Raises:
        ConfigError: it is a link to a file outside the folder, or in a circle
    """
    file = folder / name
    try:
        found, inside = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # the latter of a circle, up to Python 3.12
        raise ConfigError(str(file), "…", "is a link that leads nowhere", REMEDY) from None
    in_hub = found.parent.name == "blobs" and found.parent.parent.name.startswith("models--")
    if not in_hub and not found.is_relative_to(inside):
        raise ConfigError(str(file), str(found), "is a link to a file outside its folder", REMEDY)
    return file


def own_folder(folder: Path, name: str) -> Path:
    """A folder within a folder, to write to.

    Raises:
        ConfigError: it is a link, so that what is written would land elsewhere
    """
    if (folder / name).is_symlink():
        remedy = "Remove the link, or copy the folder without it"
        raise ConfigError("folder", str(folder / name), "is a link, which may lead out of the folder", remedy)
    return folder / name


def read_bytes(folder: Path, name: str, most: int = MAX_BYTES) -> bytes:
    """The contents of a file.

    Args:
        folder, name: as in ``place``
        most: bytes

    Raises:
        ConfigError: it is missing, no plain file, outside the folder, or longer
    """
    file = place(folder, name)
    if not file.exists():
        raise ConfigError(str(file), None, "there is no such file", "Name the folder of a complete checkpoint or run")
    return read_plain(file, str(file), REMEDY, most)


def read_text(folder: Path, name: str, most: int = MAX_BYTES) -> str:
    """The text of a file in UTF-8; raises like ``read_bytes``."""
    try:
        return read_bytes(folder, name, most).decode()
    except UnicodeDecodeError:
        raise ConfigError(str(folder / name), "…", "cannot be read (it is not UTF-8)", REMEDY) from None


def read_json(folder: Path, name: str, most: int = MAX_JSON_BYTES) -> Any:
    """The values of a JSON file.

    Raises:
        ConfigError: as ``read_text``; or it is not JSON, or holds too much
    """
    text = read_text(folder, name, most)
    return parse_json(text, str(folder / name))


def parse_json(text: str, path: str) -> Any:
    """The values of a JSON text.

    Args:
        text: of limited size
        path: of the file, for messages

    Raises:
        ConfigError: it is not JSON, or its values are too many or nested too deep
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, "…", f"cannot be read as JSON ({error})", REMEDY) from None
    level, seen = [values], 0
    for _ in range(MAX_DEPTH + 2):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for each in inner for value in each]
        seen += len(level)
        if not level or seen > MAX_JSON_NODES:
            break
    if level:
        what = f"is nested more than {MAX_DEPTH} deep"
        rule = f"holds more than {MAX_JSON_NODES:,} values" if seen > MAX_JSON_NODES else what
        raise ConfigError(path, "…", rule, REMEDY)
    return values


def read_yaml(folder: Path, name: str) -> Any:
    """The values of a YAML file; ``${…}`` in it stays as it is written.

    Raises:
        ConfigError: as ``read_text``; or it is not YAML, or holds too much
    """
    text, path = read_text(folder, name), str(folder / name)
    try:
        check_text(text, path)
        values = load_text(text)
        check_values(values, path, data=False)
    except ConfigError:
        raise
    except Exception as error:  # YAML's own, of several unrelated classes
        reason = " ".join(str(getattr(error, "problem", None) or type(error).__name__).split())
        raise ConfigError(path, "…", f"cannot be read as YAML ({reason})", REMEDY) from None
    return values


# --- resolve ``${a.b}`` in the values of a file of a folder, by other values of the same file -------------------------


_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


class References:
    """The values of a file.

    Args:
        root: the whole file, as plain values
        path: of the file, for messages
        remedy: for the same
    """

    def __init__(self, root: Mapping[str, Any], path: str, remedy: str) -> None:
        self.root, self.path, self.remedy = root, path, remedy
        self._known: dict[str, Any] = {}
        self._open: list[str] = []
        self._written = 0  # characters in place of references, of the whole file

    def resolve(self, value: Any) -> Any:
        """A value, with what it refers to in place of its references.

        Raises:
            ConfigError: it refers to anything but a value of the file, or grows beyond the limits
        """
        if isinstance(value, Mapping):
            return {key: self.resolve(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.resolve(inner) for inner in value]
        return self._text(value) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str) -> Any:
        if whole := _REFERENCE.fullmatch(text):
            return self._counted(self._named(whole[1]), text)
        if "${" in _REFERENCE.sub("", text):
            raise self._refusal(text, "is an interpolation, and one in a run's folder may only name its other settings")
        parts = enumerate(_REFERENCE.split(text))
        return "".join(part if i % 2 == 0 else str(self._counted(self._named(part), text)) for i, part in parts)

    def _counted(self, value: Any, text: str) -> Any:
        """A value that stands in place of a reference in a text."""
        self._written += len(str(value))
        if self._written > MAX_TEXT:
            raise self._refusal(text, f"refers to other settings, which come to more than {MAX_TEXT:,} characters")
        return value

    def _named(self, name: str) -> Any:
        if name not in self._known:
            if name in self._open or len(self._open) > MAX_DEPTH:
                raise self._refusal(f"${{{name}}}", "refers to itself")
            self._open.append(name)
            self._known[name] = self._scalar(name)
            self._open.pop()
        return self._known[name]

    def _scalar(self, name: str) -> Any:
        """A referenced value: mappings and lists are none, since one of them in another could grow without bound."""
        value: Any = self.root
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or isinstance(value, Mapping | list):
            raise self._refusal(f"${{{name}}}", "names no number and no text of the file")
        return self.resolve(value)

    def _refusal(self, text: str, rule: str) -> ConfigError:
        return ConfigError(self.path, text[:200], rule, self.remedy)


@contextmanager
def replaced(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place at the end, and is removed after an error.

    What a writer of this path that was killed has left is removed too.

    Args:
        path: of a file; or of a folder, which must not exist or be empty
        partial: the temporary path; None for one that is unique to this process

    Raises:
        OSError: it cannot be written; what was at ``path`` is intact
    """
    path, here = path.absolute(), _here()
    partial = partial or path.with_name(f".{path.name}.{here}.{os.getpid()}.partial")
    for left in path.parent.glob(f".{glob.escape(f'{path.name}.{here}')}.*.partial"):
        if _has_ended(left.name.split(".")[-2]):
            with suppress(OSError):
                _remove(left)
    try:
        yield partial
        for written in [partial, *partial.rglob("*")]:  # or a power failure after the rename would leave zeros
            # Flush a file, or the names of a folder
            descriptor = os.open(written, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(partial, path)
    finally:
        _remove(partial)  # on a full disk it takes room


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _here() -> str:
    """Within what a process id is unique: a kernel since it booted, and one of its process namespaces (containers)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}_{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return platform.node()


def _has_ended(process: str) -> bool:
    """Whether no process has this id; False where that cannot be known."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # of another user; not a name of ours
        pass
    return False


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        OSError: it cannot be written; the old content is intact, and nothing else is left
    """
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically; errors as in ``write_text``."""
    try:
        with replaced(file) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error  # a failed write does not name its file


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(file, json.dumps(content, indent=1))


def append_lines(file: Path, text: str) -> None:
    """Append whole lines to a text file, all of them or none, at once: lines of several writers stay apart.

    A last line that a killed writer has cut is ended first, so that it spoils no other.

    Raises:
        OSError: they cannot be written
    """
    with file.open("a+b", buffering=0) as opened:
        end = opened.seek(0, os.SEEK_END)
        if end:
            opened.seek(end - 1)
        content = (b"\n" if end and opened.read(1) != b"\n" else b"") + text.encode()
        try:
            if opened.write(content) < len(content):  # the rest did not fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if file.stat().st_size > end:
                os.truncate(opened.fileno(), end)
            raise OSError(error.errno, error.strerror, str(file)) from error
