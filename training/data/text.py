"""Your own text files as a corpus.

Files are read whole, one at a time: this is for corpora of some gigabytes, not for a crawl of the web, which wants a
streaming corpus (``datasets``, ``litdata``) in a subclass of ``Corpus``.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from registry.errors import ConfigError, did_you_mean
from training.data.corpus import SPLITS, Corpus, Split

ENOUGH_DOCUMENTS = 10  # below this a held-out document would be too large a part of the text
QUICK_BYTES = 16 * 2**20  # what `check` is willing to read: about a tenth of a second


def assign(n_documents: int, val_fraction: float, test_fraction: float, seed: int) -> list[Split]:
    """Which split each of many documents belongs to: a seeded shuffle, at least one document a wanted split.

    Args:
        n_documents: how many documents there are
        val_fraction: part of the documents to validate on, 0 for none
        test_fraction: part of the documents to test on, 0 for none
        seed: of the shuffle
    """
    n_val, n_test = (max(1, int(n_documents * f)) if f else 0 for f in (val_fraction, test_fraction))
    parts: list[Split] = ["train"] * n_documents
    shuffled = random.Random(seed).sample(range(n_documents), n_documents)
    for i in shuffled[:n_val]:
        parts[i] = "val"
    for i in shuffled[n_val : n_val + n_test]:
        parts[i] = "test"
    return parts


def tail(text: str, split: Split, val_fraction: float, test_fraction: float) -> str:
    """The piece of one document that belongs to a split: train, then val, then test, cut at the starts of lines.

    Args:
        text: the document
        split: which piece
        val_fraction: part of the characters to validate on
        test_fraction: part of the characters to test on
    """

    def line_start(fraction: float) -> int:
        at = round(len(text) * fraction)
        if not 0 < at < len(text):
            return at
        newline = text.find("\n", at - 1)
        return newline + 1 if newline >= 0 else len(text)

    val, test = line_start(1 - val_fraction - test_fraction), line_start(1 - test_fraction)
    return {"train": text[:val], "val": text[val:test], "test": text[test:]}[split]


class TextFiles(Corpus):
    """UTF-8 text files; each is one document, or several if a separator stands between them.

    With ten documents or more, whole documents are held out, chosen by ``split_seed``. With fewer, the last part of
    *each* document is held out, cut at the start of a line: then the splits share authors and topics, though no line.

    Args:
        files: a path or glob (``~/books/**/*.txt``), or a list of them; ``~`` is expanded, duplicates count once
        separator: text that stands between documents within a file (``<|endoftext|>``); null makes each file one
            document
        val_fraction: part of the text to validate on, in [0, 1); 0 for no validation
        test_fraction: part of the text to test on, in [0, 1); 0 for no test
        split_seed: which documents are held out. Not the seed of the run, so that runs with different seeds are
            measured on the same text
    """

    def __init__(
        self,
        files: str | list[str],
        separator: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_seed: int = 0,
    ) -> None:
        self.files = [files] if isinstance(files, str) else [str(name) for name in files]
        self.separator = separator
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.split_seed = split_seed
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= value < 1:
                raise ConfigError(
                    f"data.corpus.{name}", value, "a fraction lies in [0, 1)", "Take 0.05, or 0 for no such split"
                )
        if val_fraction + test_fraction >= 1:
            raise ConfigError(
                "data.corpus.val_fraction",
                val_fraction,
                f"with test_fraction = {test_fraction!r} nothing is left to train on",
                "Make the two sum to less than 1",
            )
        if separator == "":
            raise ConfigError(
                "data.corpus.separator", separator, "an empty string separates nothing", "Write null, or the text"
            )

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, files in sorted order.

        Raises:
            ConfigError: at ``data.corpus.files``, for files that are missing or are not UTF-8; at the split's fraction,
                when that is not 0 and no text is there for it
        """
        parts, is_empty = self._parts, True
        for i, text in enumerate(self._texts()):
            if parts is None:
                text = tail(text, split, self.val_fraction, self.test_fraction)
            elif parts[i] != split:
                continue
            if text:
                is_empty = False
                yield text
        name = "test_fraction" if split == "test" else "val_fraction"
        if is_empty and (split == "train" or getattr(self, name)):
            raise ConfigError(
                f"data.corpus.{name}",
                getattr(self, name),
                f"no text is left for the {split} split (documents are cut at line ends only)",
                "Change the fraction (0 for no such split), set data.corpus.separator, or name more files",
            )

    def check(self) -> None:
        """Refuse missing or empty files, and, as far as 16 MB of reading shows, broken encoding and empty splits.

        Raises:
            ConfigError: at ``data.corpus.files``, or at the fraction whose split has no text
        """
        if not self._n_bytes:
            raise ConfigError("data.corpus.files", self._shown, "the files hold no text", "Name others")
        if not self.is_small():
            with self._paths[0].open("rb") as file:
                decode(file.read(QUICK_BYTES), self._paths[0], is_whole=False)
            return
        is_blank = [not text.strip() for text in self._texts()]  # of all, so that every file's encoding is seen
        if all(is_blank):
            raise ConfigError("data.corpus.files", self._shown, "the files hold only blanks", "Name others")
        for split in SPLITS:
            next(self.documents(split), None)

    def is_small(self) -> bool:
        """Up to 16 MB."""
        return self._n_bytes <= QUICK_BYTES

    def fingerprint(self) -> str:
        """Digest of the files' contents in order and of all options; the files' names and places do not enter."""
        options = [self.separator, self.val_fraction, self.test_fraction, self.split_seed]
        digest = hashlib.sha256(json.dumps(options).encode())
        for path in self._paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def _shown(self) -> str | list[str]:
        return self.files[0] if len(self.files) == 1 else self.files

    @cached_property
    def _paths(self) -> list[Path]:
        if not self.files:
            raise ConfigError(
                "data.corpus.files", [], "no file is named", "For example: data.corpus.files='books/*.txt'"
            )
        return sorted({path for pattern in self.files for path in expand(pattern)})

    @property
    def _n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._paths)

    def _texts(self) -> Iterator[str]:
        for path in self._paths:
            text = decode(path.read_bytes(), path)
            if self.separator is None:
                yield text
            else:
                yield from (piece.strip("\n") for piece in text.split(self.separator) if piece.strip())

    @cached_property
    def _parts(self) -> list[Split] | None:
        """The split of each document, None where documents are too few and each is cut instead."""
        # Counting documents costs a pass over the text only where a separator decides.
        n = len(self._paths) if self.separator is None else sum(1 for _ in self._texts())
        if n < ENOUGH_DOCUMENTS:
            return None
        return assign(n, self.val_fraction, self.test_fraction, self.split_seed)


def expand(pattern: str) -> list[Path]:
    """The files that a path or glob names.

    Raises:
        ConfigError: at ``data.corpus.files``, for a directory, or when there is no such file; it names the nearest
    """
    path = Path(os.path.expanduser(pattern))
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError(
            "data.corpus.files", pattern, "this is a directory, files are needed", f"Name them: '{pattern}/**/*.txt'"
        )
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [each for each in found if each.is_file()]
    if files:
        return files
    is_glob = glob.has_magic(str(path))
    rule = "the pattern matches no file" if is_glob else "there is no such file"
    folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)) and parent.is_dir())
    if is_glob or folder == path.parent:
        names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_file()]
        looked_for = path.name
    else:  # the mistake is in a folder's name
        names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()]
        looked_for = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(looked_for, names, n=5, cutoff=0.5) or names[:5]
    raise ConfigError(
        "data.corpus.files", pattern, rule, did_you_mean(looked_for, near, f"{folder} is empty") + f" (in {folder})"
    )


def decode(data: bytes, path: Path, is_whole: bool = True) -> str:
    """Bytes of a file as text, without a byte-order mark.

    Args:
        data: the bytes, from the start of the file
        path: of the file, for the message
        is_whole: False if ``data`` may end within a character

    Raises:
        ConfigError: at ``data.corpus.files``, with the offset of the first byte that is not UTF-8
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if not is_whole and error.start >= len(data) - 3:
            return data[: error.start].decode("utf-8").removeprefix("\ufeff")
        raise ConfigError(
            "data.corpus.files",
            str(path),
            f"the byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8",
            f"Convert the file, for example: iconv -f LATIN1 -t UTF-8 '{path}'",
        ) from None
