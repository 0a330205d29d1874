"""The interface of a corpus: documents of text in three disjoint splits.

A corpus contains text only: no tokens, no batches, no Lightning. For other kinds of data, subclass ``Corpus`` in your
own package and name the class as ``data.corpus._target_``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

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
