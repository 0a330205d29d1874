"""The documentation of the Linux kernel: technical prose, read from a package of Debian or from the kernel's sources.

Debian's ``linux-doc-6.12`` has about 3,600 pages and 28 MB, under the GPL-2. The package holds each page a second time,
next to its HTML, which is not read. Debian revises the package in place, so pages are compared by their contents.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.index import readable
from blockwright.registry.schema import Place
from blockwright.training.data.corpus import SPLITS, Corpus, Split
from blockwright.training.data.fingerprint import digest, of_file
from blockwright.training.data.text import assign, expand

PATH = "data.corpus.folder"
PACKAGE = "linux-doc-6.12"
HELD_OUT = 0.05  # of the pages, to validate and to test on each
LEAST = 10  # pages
REMEDY = f"On Debian: apt install {PACKAGE}. Else name the folder in the kernel's sources: {PATH}=linux/Documentation"


@readable
@enforced("data.corpus")
class KernelDocumentation(Corpus):
    """Pages of the kernel's documentation, a document each; a twentieth each to validate and to test on.

    Args:
        folder: that holds the pages, ``.rst`` or ``.rst.gz``: /usr/share/doc/linux-doc-6.12/Documentation on Debian
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder

    def documents(self, split: Split) -> Iterator[str]:
        """The pages of a split, sorted by their paths.

        Raises:
            ConfigError: at ``data.corpus.folder``, for a page that is not UTF-8 or cannot be decompressed
        """
        parts = assign(len(self._pages), HELD_OUT, HELD_OUT, seed=0)
        return (_text(page) for page, part in zip(self._pages, parts, strict=True) if SPLITS[part] == split)

    def check(self) -> None:
        """Refuse a folder that is missing, or has too few pages.

        Raises:
            ConfigError: at ``data.corpus.folder``
        """
        if len(self._pages) < LEAST:
            rule = f"holds {len(self._pages)} pages (.rst, .rst.gz), and {LEAST} are needed to hold some out"
            raise ConfigError(PATH, self.folder, rule, REMEDY)

    def is_small(self) -> bool:
        """False: 28 MB."""
        return False

    def fingerprint(self) -> str:
        """Digest of the pages' contents in order."""
        return digest(HELD_OUT, [of_file(page) for page in self._pages])

    def paths(self) -> list[Path]:
        return self._pages

    @cached_property
    def _pages(self) -> list[Path]:
        folder = Path(self.folder).expanduser()
        if not folder.is_dir():
            raise ConfigError(PATH, self.folder, "there is no such folder", REMEDY)
        return sorted(file for file in expand(f"{folder}/**/*.rst*", PATH) if file.name.endswith((".rst", ".rst.gz")))


def _text(page: Path) -> str:
    try:
        content = page.read_bytes()
        return (gzip.decompress(content) if page.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(PATH, str(page), f"cannot be read ({error})", "Install the package again") from None
