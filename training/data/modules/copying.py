"""The data module of strings to copy, ``data=copying``: a task on which a known effect is as large as it can be."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.data.copying import CopyRows, Strings
from blockwright.training.data.corpus import Split
from blockwright.training.data.modules.batches import Feeding
from blockwright.training.data.modules.fresh import FreshRowDataModule

LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))  # 94 characters of one byte


@register("data", "copying")
class CopyingDataModule(FreshRowDataModule):
    """Rows of a random string again and again; its repetitions are scored (training/data/copying.py).

    With ``shortest`` = ``longest`` a model may copy from a fixed distance, which one layer learns; with a range it has
    to find the earlier occurrence, which takes two (Olsson et al. 2022, arXiv 2209.11895). A model that knows nothing
    has a loss of ln ``symbols``. Nothing is read, and no row is served twice.

    Args:
        feeding: how rows are made into batches; the tokenizer has an id for each symbol
        symbols: different characters
        shortest, longest: tokens of a string; less than a row has
        held_out: rows of val and of test
    """

    def __init__(
        self,
        feeding: Feeding,
        symbols: Annotated[int, Ge(2), Le(len(LETTERS))] = 64,
        shortest: Count = 32,
        longest: Count = 32,
        held_out: Count = 128,
    ) -> None:
        super().__init__(feeding, held_out)
        self.letters, self.shortest, self.longest = LETTERS[:symbols], shortest, longest
        if longest < shortest:
            raise ConfigError("data.longest", longest, f"must be at least shortest ({shortest})", "Raise it")
        if longest >= self.sequence_length:
            rule = f"fills a row (data.sequence_length = {self.sequence_length}), so that nothing of it is repeated"
            raise ConfigError("data.longest", longest, rule, f"Set data.longest={self.sequence_length // 2}")
        if (unequal := len(self._ids())) != symbols:
            rule = f"must be one token each, and the tokenizer makes {unequal} of them"
            raise ConfigError("data.symbols", symbols, rule, "Write data/tokenizer=chars, or data/tokenizer=bytes")

    def _ids(self) -> Any:
        """The ids of the symbols."""
        if not self.tokenizer.fitted:
            self.tokenizer.fit([self.letters])
        return np.unique(self.tokenizer.encode(self.letters)).astype(np.int64)

    def _rows(self, split: Split) -> CopyRows:
        return CopyRows(Strings(self._ids(), self.sequence_length, self.shortest, self.longest, self.seed), split)

    def _made_by(self) -> dict[str, Any]:
        return {"symbols": len(self.letters), "shortest": self.shortest, "longest": self.longest}
