"""A corpus: documents of text in three disjoint splits; and your own text files as one.

A corpus contains text only: no tokens, no batches, no Lightning. For other kinds of data, subclass ``Corpus`` in your
own package and name the class as ``data.corpus._target_``: for a web crawl, one that downloads on demand (``datasets``,
``litdata``). Files are read in pieces, in a few passes, so that many gigabytes need no more memory than a small file.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.index import readable
from blockwright.registry.limits import KERNEL
from blockwright.registry.ranges import BelowOne, Whole
from blockwright.registry.schema import Place
from blockwright.training.data.fingerprint import digest, of_file, state
from blockwright.training.data.pieces import between, documents, line_starts, read

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Corpus(ABC):
    """Documents of text, with a fixed division into ``train``, ``val`` and ``test``.

    The division depends on the corpus's own arguments only, never on the seed of a training run, so that runs with
    different seeds are measured on the same text.
    """

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split, always in the same order.

        Args:
            split: ``train``, ``val`` or ``test``; a corpus without such a split yields nothing
        """

    def streams(self, split: Split) -> Iterator[Iterable[str]]:
        """The same documents, each as consecutive pieces of text, cut anywhere.

        Override it for documents too large for memory, to read them in pieces. Each is read to its end, or dropped,
        before the next is requested.

        Args:
            split: as for ``documents``
        """
        return ([text] for text in self.documents(split))

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot work (missing files, no text, broken encoding) in well under a second.

        Raises:
            blockwright.registry.errors.ConfigError: at a path below ``data.corpus``
        """

    @abstractmethod
    def is_small(self) -> bool:
        """Whether all documents can be read in well under a second: then more mistakes are found before a run."""

    def paths(self) -> Sequence[Path]:
        """The files that its settings name, which are checked before a corpus of an untrusted folder is read."""
        return ()

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest of everything that ``documents`` depends on.

        It names the token cache and is compared on resuming, so it must not depend on the location of the files.
        """


ENOUGH_DOCUMENTS = 10  # with fewer, a held-out document would be too large a part of the text
LEFT_OUT = {"files": "their contents are compared, wherever they are"}
QUICK_BYTES = 16 * 2**20  # read by `check`: about a tenth of a second


def assign(n_documents: int, val_fraction: float, test_fraction: float, seed: int) -> npt.NDArray[np.uint8]:
    """Assign documents to splits: a seeded shuffle, with at least one document for each requested split.

    Args:
        n_documents: number of documents
        val_fraction: fraction of the documents to validate on, 0 for none
        test_fraction: fraction of the documents to test on, 0 for none
        seed: of the shuffle

    Returns:
        index into ``SPLITS`` of each document [n_documents]
    """
    n_val, n_test = (max(1, int(n_documents * f)) if f else 0 for f in (val_fraction, test_fraction))
    parts = np.zeros(n_documents, dtype=np.uint8)
    shuffled = _first_of_shuffle(n_documents, n_val + n_test, seed)
    parts[shuffled[:n_val]] = SPLITS.index("val")
    parts[shuffled[n_val:]] = SPLITS.index("test")
    return parts


def _first_of_shuffle(n: int, k: int, seed: int) -> list[int]:
    """``random.Random(seed).sample(range(n), n)[:k]``, without a list of n."""
    draw, moved, first = random.Random(seed), dict[int, int](), list[int]()
    for left in range(n, n - min(k, n), -1):
        i = draw.randrange(left)
        first.append(moved.get(i, i))
        moved[i] = moved.get(left - 1, left - 1)
    return first


@readable
@enforced("data.corpus")
class TextFiles(Corpus):
    """UTF-8 text files; each is one document, or several with a separator between them.

    With ten documents or more, whole documents are held out, chosen by ``split_seed``. With fewer, the last part of
    *each* document is held out, cut at a line start: then the splits share authors and topics, but no lines.

    Args:
        files: a path or glob (``~/books/**/*.txt``), or a list of them; ``~`` is expanded, duplicates count once
        separator: text between documents within a file (``<|endoftext|>``); null makes each file one document
        val_fraction: part of the text to validate on, in [0, 1); 0 for no validation
        test_fraction: part of the text to test on, in [0, 1); 0 for no test
        split_seed: which documents are held out. Independent of the run's seed, so that runs with different seeds are
            measured on the same text
    """

    def __init__(
        self,
        files: Place | list[Place],
        separator: str | None = None,
        val_fraction: BelowOne = 0.05,
        test_fraction: BelowOne = 0.05,
        split_seed: Whole = 0,
    ) -> None:
        if not isinstance(files, Sequence):
            rule = "must be a path or glob, or a list of them"
            raise ConfigError("data.corpus.files", files, rule, "For example: data.corpus.files='books/*.txt'")
        self.files = [files] if isinstance(files, str) else [str(name) for name in files]
        self.separator = separator
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.split_seed = split_seed
        if val_fraction + test_fraction >= 1:
            raise ConfigError(
                "data.corpus.val_fraction",
                val_fraction,
                f"with test_fraction = {test_fraction!r} nothing is left to train on",
                "Make the two sum to less than 1",
            )
        if not isinstance(separator, str | None):
            rule = "must be the text between documents, or null"
            raise ConfigError(
                "data.corpus.separator", separator, rule, f"Quote it: data.corpus.separator='\"{separator}\"'"
            )
        if separator == "":
            raise ConfigError(
                "data.corpus.separator", separator, "an empty string separates nothing", "Write null, or the text"
            )

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, files in sorted order.

        Raises:
            ConfigError: as ``streams``
        """
        return ("".join(pieces) for pieces in self.streams(split))

    def streams(self, split: Split) -> Iterator[Iterable[str]]:
        """The documents of a split in pieces, files in sorted order.

        Raises:
            ConfigError: at ``data.corpus.files``, for files that are missing or are not UTF-8; at the split's fraction,
                if that is not 0 but its split has no text
        """
        parts, which, is_empty = self._parts, SPLITS.index(split), True
        for i, pieces in enumerate(self._texts()):
            if parts is None:
                pieces = between(pieces, *self._tails[i][which : which + 2])
            elif parts[i] != which:
                continue
            first = next(pieces, None)
            if first is not None:
                is_empty = False
                yield chain([first], pieces)
        name = "test_fraction" if split == "test" else "val_fraction"
        if is_empty and (split == "train" or getattr(self, name)):
            raise ConfigError(
                f"data.corpus.{name}",
                getattr(self, name),
                f"no text is left for the {split} split (documents are cut at line ends only)",
                "Change the fraction (0 for no such split), set data.corpus.separator, or name more files",
            )

    def check(self) -> None:
        """Refuse missing or empty files, and, within 16 MB of reading, broken encoding and empty splits.

        Raises:
            ConfigError: at ``data.corpus.files``, or at the fraction of a split without text
        """
        if not self._n_bytes:
            raise ConfigError("data.corpus.files", self._shown, "the files hold no text", "Name others")
        if not self.is_small():
            for _ in read(self._paths[0], QUICK_BYTES):
                pass
            return
        is_blank = [not any(map(str.strip, pieces)) for pieces in self._texts()]  # of all: every file is decoded
        if all(is_blank):
            raise ConfigError("data.corpus.files", self._shown, "the files hold only blanks", "Name others")
        for split in SPLITS:
            next(self.streams(split), None)

    def is_small(self) -> bool:
        """Up to 16 MB."""
        return self._n_bytes <= QUICK_BYTES

    def fingerprint(self) -> str:
        """Digest of the files' contents in order and of all options; file names and locations do not matter."""
        return digest(state(self, LEFT_OUT), list(map(of_file, self._paths)))

    def paths(self) -> list[Path]:
        return self._paths

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

    def _texts(self) -> Iterator[Iterator[str]]:
        """All documents in pieces; each must be read, or dropped, before the next is requested."""
        for path in self._paths:
            if self.separator is None:
                yield read(path)
            else:
                yield from documents(read(path), self.separator)

    @cached_property
    def _parts(self) -> npt.NDArray[np.uint8] | None:
        """The split of each document; None if there are too few and each is cut instead."""
        # Counting documents takes a pass over the text only with a separator.
        n = len(self._paths) if self.separator is None else sum(1 for _ in self._texts())
        if n < ENOUGH_DOCUMENTS:
            return None
        return assign(n, self.val_fraction, self.test_fraction, self.split_seed)

    @cached_property
    def _tails(self) -> list[list[int]]:
        """Start positions of the train, val and test pieces of each document, and the end of the last."""
        lengths = [sum(map(len, pieces)) for pieces in self._texts()]
        shares = (1 - self.val_fraction - self.test_fraction, 1 - self.test_fraction)
        return [
            [0, *line_starts(pieces, [round(length * share) for share in shares], length), length]
            for pieces, length in zip(self._texts(), lengths, strict=True)
        ]


def _refuse_everywhere(path: Path, pattern: str, where: str) -> None:
    """Refuse a pattern that looks through the whole disk, or where the kernel makes files up."""
    first = path.parts[1:2]
    if path.is_absolute() and glob.has_magic(str(path)) and (glob.has_magic(first[0]) or path.parts[:2] in KERNEL):
        rule = "looks through folders that hold no text of yours"
        raise ConfigError(where, pattern, rule, "Name a folder: /data/books/**/*.txt")


def _matching(path: Path) -> Iterator[Path]:
    """What a pattern matches, without hidden names; ``**`` follows no links, which may lead in circles."""
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    rest = path.parts[len(fixed.parts) :]
    if "**" not in rest:
        return map(Path, glob.glob(str(path)))
    found = fixed.glob(str(Path(*rest)))
    return (each for each in found if not any(part.startswith(".") for part in each.relative_to(fixed).parts))


def expand(pattern: str, where: str = "data.corpus.files") -> list[Path]:
    """The files matching a path or glob.

    Args:
        pattern: the path or glob
        where: path of the setting

    Raises:
        ConfigError: at ``where``, for a directory, or a missing file, naming the nearest
    """
    path = Path(os.path.expanduser(pattern))
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError(where, pattern, "is a directory, but files are needed", f"Name them: '{pattern}/**/*.txt'")
    if path.exists():
        rule = "is no ordinary file, and a text is read more than once"
        raise ConfigError(where, pattern, rule, "Write what it holds to a file")
    _refuse_everywhere(path, pattern, where)
    files = [each for each in _matching(path) if each.is_file()]
    if files:
        return files
    is_glob = glob.has_magic(str(path))
    searched = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    folder = next(parent for parent in (searched, *searched.parents) if parent.is_dir())
    rule = "the pattern matches no file" if is_glob else "there is no such file"
    rule = rule if folder == searched else f"there is no folder {searched}"
    if folder == searched:
        names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_file()]
        looked_for = path.name
    else:  # a folder's name is wrong
        names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()]
        looked_for = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(looked_for, names, n=5, cutoff=0.5) or names[:5]
    kind = "file" if folder == searched else "folder"
    if not near:
        raise ConfigError(where, pattern, rule, f"Name another path: {folder.resolve()} holds no {kind}")
    raise ConfigError(where, pattern, rule, f"{did_you_mean(looked_for, near)} (in {folder})")
