"""The long documents of a stream, as a ring of their own."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from blockwright.registry.errors import ConfigError
from blockwright.training.data.packing import Ints, Stream


class LongDocuments:
    """The tokens of the documents with at least ``least`` tokens, one after another. Nothing is copied: it is an index.

    Most text is short, so long windows cut from all of it hold many documents and few long distances. ProLong (Gao et
    al. 2024, arXiv 2410.02660) takes its long windows from books and repositories only.

    Args:
        stream: the tokens
        least: tokens of a document that is kept, its end included
    """

    def __init__(self, stream: Stream, least: int) -> None:
        lengths = np.diff(np.append(stream.starts, stream.n_tokens))
        kept = lengths >= least
        self.starts, self.lengths, self.least = stream.starts[kept], lengths[kept], least
        if not len(self.starts):
            longest = int(lengths.max(initial=0))
            rule = f"no document of the train split is so long: the longest has {longest} tokens"
            raise ConfigError("data.min_length", least, rule, f"Set data.min_length={longest} or less, or null")

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of these documents."""
        return int(self._ends[-1])

    def places(self, indices: Ints) -> Ints:
        """Indices into these documents → indices into the stream, of any shape."""
        document = np.searchsorted(self._ends, indices, side="right")
        return self.starts[document] + indices - (self._ends[document] - self.lengths[document])
