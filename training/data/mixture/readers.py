"""Documents of text from files of any size: JSON lines, plain or compressed, Parquet, Arrow and plain text."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from blockwright.registry.errors import ConfigError, did_you_mean, require

PATH = "FILES"
ROWS = 1024  # of a table, read at once


def documents(path: Path, column: str) -> Iterator[str]:
    """The documents of a file; blank ones are left out.

    Args:
        path: of the file; its suffix tells the format
        column: of a record that has the text

    Raises:
        ConfigError: for a suffix that is not read, and for a record without text, with its file and number
    """
    return (text for text in _reader(path)(path, column) if text.strip())


def check(path: Path) -> None:
    """Refuse a file whose suffix is not read, or needs a package that is not installed.

    Raises:
        ConfigError
    """
    _reader(path)
    if path.suffix in (".zst", ".parquet", ".arrow"):
        require("parquet", "pyarrow", path=PATH, value=str(path))


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    suffix = "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix
    if suffix not in READERS:
        rule = "is of no format that is read"
        raise ConfigError(PATH, str(path), rule, did_you_mean(suffix, READERS))
    return READERS[suffix]


def _plain(path: Path, column: str) -> Iterator[str]:
    """A file is one document."""
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(path, f"the byte at offset {error.start} is not UTF-8")


def _lines(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        yield from _records(path, file, column)


def _gzip_lines(path: Path, column: str) -> Iterator[str]:
    with gzip.open(path) as file:
        try:
            yield from _records(path, file, column)
        except (EOFError, OSError) as error:
            _refuse(path, f"cannot be decompressed ({error})")


def _zstd_lines(path: Path, column: str) -> Iterator[str]:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as stream:
        try:
            yield from _records(path, io.BufferedReader(stream, 2**20), column)
        except OSError as error:
            _refuse(path, f"cannot be decompressed ({error})")


def _records(path: Path, lines: Any, column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # or it is nested too deeply
            _refuse(path, f"line {number} is not JSON ({error})")
        yield _text(record, column, f"line {number}", path)


def _text(record: Any, column: str, where: str, path: Path) -> str:
    if not isinstance(record, dict):
        _refuse(path, f"{where} is no record, but {type(record).__name__}")
    if not isinstance(text := record.get(column), str):
        held = ", ".join(record) if column not in record else f"{type(text).__name__} in it"
        _refuse(path, f"{where} has no text in {column!r}: it has {held}", "Name the column: --column NAME")
    return text


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _refuse_column(path, file.schema_arrow.names, column)
            for batch in file.iter_batches(ROWS, columns=[column]):
                yield from _of_table(batch, path, column)
    except pyarrow.ArrowException as error:
        _refuse(path, f"cannot be read as Parquet ({error})")


def _arrow(path: Path, column: str) -> Iterator[str]:
    """A file of Arrow's, or a stream, as ``datasets`` writes."""
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            for batch in _batches(ipc.open_file(mapped)) if is_file else ipc.open_stream(mapped):
                _refuse_column(path, batch.schema.names, column)
                yield from _of_table(batch.select([column]), path, column)
    except pyarrow.ArrowException as error:
        _refuse(path, f"cannot be read as Arrow ({error})")


def _batches(file: Any) -> Iterator[Any]:
    return (file.get_batch(i) for i in range(file.num_record_batches))


def _of_table(batch: Any, path: Path, column: str) -> Iterator[str]:
    for record in batch.to_pylist():
        yield _text(record, column, "a row", path)


def _refuse_column(path: Path, names: list[str], column: str) -> None:
    if column not in names:
        _refuse(path, f"has no column {column!r}", f"Name it: --column NAME. {did_you_mean(column, names)}")


def _refuse(path: Path, rule: str, remedy: str = "Correct the file, or leave it out") -> NoReturn:
    raise ConfigError(PATH, str(path), rule, remedy)


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _lines,
    ".jsonl.gz": _gzip_lines,
    ".json.gz": _gzip_lines,
    ".jsonl.zst": _zstd_lines,
    ".json.zst": _zstd_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
