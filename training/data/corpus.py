"""What a corpus is: documents of text in three splits that share none of them.

A corpus knows text only: no tokens, no batches, no Lightning. Whoever has data of another kind subclasses ``Corpus``
in a package of their own and names the class as ``data.corpus._target_``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Corpus(ABC):
    """Documents of text, divided once and for all into ``train``, ``val`` and ``test``.

    The division depends on the corpus' own arguments only, never on the seed of a training run: two runs with
    different seeds are then measured on the same text.
    """

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split, always in the same order.

        Args:
            split: ``train``, ``val`` or ``test``; a corpus without such a split yields nothing
        """

    def streams(self, split: Split) -> Iterator[Iterable[str]]:
        """The same documents, each in pieces of text that follow one another, cut anywhere.

        For documents that are too large to be held in memory: override it to read them bit by bit. Each is read to its
        end, or left, before the next is asked for.

        Args:
            split: as for ``documents``
        """
        return ([text] for text in self.documents(split))

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot work (missing files, no text, broken encoding) in well under a second.

        Raises:
            registry.errors.ConfigError: at a path below ``data.corpus``
        """

    @abstractmethod
    def is_small(self) -> bool:
        """Whether all documents can be read in well under a second: then more mistakes are found before a run."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest of everything that ``documents`` depends on.

        It names the token cache and is compared on resuming, so it must not depend on where the files lie.
        """
