"""The data module of preferences: batches of pairs, of which both answers are scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockwright.plugins.alignment.data.preferences import PairRendering
from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.modules.batches import Batches
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.order import PADDING, LineBatches
from blockwright.training.data.packing import Ints, Stream
from blockwright.training.data.rows import Rows, best_fit


class Pairs(Rows):
    """Batches of P pairs: 2·P conversations, the chosen ones first, packed into rows as long as the longest.

    ``tokens``, ``targets``, ``segments``, ``positions`` as in ``Rows``; ``sequence`` [B,T], the number of the
    conversation that a scored target belongs to, else −1; ``pair`` [P], the numbers of the pairs in their split.

    Args:
        stream: the annotated tokens (``preferences.py``), a pair each
        separator: between the two conversations of a pair
        token_bytes: UTF-8 bytes of each id [V]
    """

    def __init__(self, stream: Stream, separator: int, token_bytes: Ints) -> None:
        self.separator = separator
        super().__init__(stream, 0, token_bytes)

    def _arrange(self) -> list[list[int]]:
        """The two conversations of each pair, as items of their own."""
        between = np.flatnonzero(self.stream.tokens == self.separator).astype(np.int64)
        lengths = np.stack([between - self.starts, self.starts + self.lengths - between - 1], 1)
        self.starts, self.lengths = np.stack([self.starts, between + 1], 1).ravel(), lengths.ravel()
        return [[2 * pair, 2 * pair + 1] for pair in range(len(between))]

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """The batch of these pairs, by number; −1 is left out, and without any there is one row of padding."""
        real = [pair for pair in rows if pair != PADDING]
        items = [self.rows[pair][side] for side in (0, 1) for pair in real]
        lengths = self.lengths[items] if items else np.zeros(0, dtype=np.int64)
        T = int(lengths.max(initial=2))
        packed = best_fit(lengths, T) or [[]]
        filled = [self._row([items[i] for i in row], T) for row in packed]
        batch = {name: np.stack([each[name] for each in filled]) for name in filled[0] if name != "n_bytes"}
        numbers = np.stack(
            [np.append(row, PADDING)[each["segments"]] for row, each in zip(packed, filled, strict=True)]
        )
        batch["sequence"] = np.where(batch["targets"] >= 0, numbers, -1).astype(np.int64)
        return {**{k: torch.from_numpy(v) for k, v in batch.items()}, "pair": torch.tensor(real, dtype=torch.int64)}

    __getitem__ = __getitems__  # called by a loader whose items are lists, without a batch sampler


@register("data", "preferences")
class PreferenceDataModule(ChatDataModule):
    """Pairs of a chosen and a rejected answer, in an order that is a function of seed and epoch.

    Args:
        batching: the corpus, of ``Preference``s, and how it is made into batches: ``sequence_length`` is the longest
            conversation in tokens, ``batch_size`` the pairs of a step over all processes
        chat: the format of conversations
    """

    rendering: PairRendering

    def _render(self) -> PairRendering:
        return PairRendering(self.tokenizer, self.chat, self.sequence_length)

    def _describe(self) -> str:
        dropped = self._pack().vocabulary["counts"].get("dropped", 0)
        sizes = ", ".join(f"{self.number(split):,} to {split}" for split in SPLITS)
        return f"preferences: {sizes}; {dropped:,} dropped (data.sequence_length={self.sequence_length})"

    def _check_lengths(self) -> None:
        if not self._streams["train"].n_tokens:
            rule = "no pair of the train split fits: both of its conversations must"
            raise ConfigError("data.sequence_length", self.sequence_length, rule, "Raise data.sequence_length")

    def _make_rows(self, split: Split, length: int) -> Pairs:
        return Pairs(self._streams[split], self.rendering.separator, self.tokenizer.token_bytes())

    def tokens(self, split: Split, places: slice = slice(None)) -> npt.NDArray[Any]:
        """As in ``ChatDataModule``; the two conversations of a pair have the token that ends documents between them."""
        marked = self._streams[split].tokens[places]
        return np.where(marked == self.rendering.separator, self.tokenizer.eos, marked // 2)

    @property
    def key(self) -> str:
        """A digest of what the tokens of all pairs depend on; needs ``setup``."""
        assert self._key is not None
        return self._key

    def number(self, split: Split) -> int:
        """The pairs of a split; needs ``setup``."""
        return len(self._packed(split, self.sequence_length))

    def every(self, split: Split) -> Batches:
        """All pairs of a split in order; equally many batches on every process."""
        line = LineBatches(self.number(split) + 1, 1, self.eval_batch_size, None, *self._share())
        return self._loader(self._dataset(split, self.sequence_length), batch_sampler=line)
