"""The data module of conversations with pictures: ``task=causal_lm data=images``, of a model with an image side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np

from blockwright.plugins.vision.data.picture_conversations import PictureCorpus
from blockwright.plugins.vision.data.picture_rows import PictureRendering, PictureRows, Sights, images_of, refuse_token
from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.data.chat.formats import Chat
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.modules.text import Batching
from blockwright.training.data.packing import Ints, Packed
from blockwright.training.data.rows import RowOrder


def deal(loads: Ints, n: int) -> list[list[int]]:
    """Deal items to n hands of equal number, the heaviest first, each to the lightest hand with room.

    Args:
        loads: of the items; n divides their number
        n: hands

    Returns:
        the items of each hand, ascending
    """
    hands: list[list[int]] = [[] for _ in range(n)]
    room, sums = len(loads) // n, [0] * n
    for item in np.argsort(-loads, kind="stable").tolist():
        hand = min((k for k in range(n) if len(hands[k]) < room), key=sums.__getitem__)
        hands[hand].append(item)
        sums[hand] += int(loads[item])
    return [sorted(hand) for hand in hands]


@dataclass(frozen=True)
class DealtOrder(RowOrder):
    """The order of ``RowOrder``, the rows of each batch dealt evenly to the processes.

    A batch has the same rows for every number of processes, and the loss divides by the scored tokens of all: dealing
    changes which process sees a row, and nothing else.

    Args:
        loads: tiles of each row
        world_size: data-parallel processes
    """

    loads: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    world_size: int = 1

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Ints]]:
        for length, rows in super().batches(first, last):
            yield length, rows[np.concatenate(deal(self.loads[rows], self.world_size))]


@register("data", "images")
class PictureDataModule(ChatDataModule):
    """Whole conversations with their pictures packed into rows, of which the answers are scored.

    A batch is that of ``ChatDataModule`` with ``images.tiles`` and ``images.grids``. Pictures are opened when a batch
    needs them.

    Args:
        batching: the corpus, a ``PictureCorpus``, and how it is made into batches
        chat: the format of conversations
        model: the composition of the model, whose tower and tiling say how pictures are cut and how long they are
        row_tiles: at most so many tiles of pictures in a row; null for as many as fit
    """

    corpus: PictureCorpus
    rendering: PictureRendering

    def __init__(
        self, batching: Batching, chat: Chat, model: Mapping[str, Any], row_tiles: Count | None = None
    ) -> None:
        self.images, self.row_tiles = images_of(model), row_tiles
        super().__init__(batching, chat)

    def _check_corpus(self) -> None:
        if not isinstance(self.corpus, PictureCorpus):
            rule = "this data needs conversations with pictures, which the corpus does not give"
            target = "blockwright.plugins.vision.data.picture_conversations.PictureConversations"
            remedy = f"Write data.corpus._target_={target}, or use data=chat"
            raise ConfigError("data.corpus", type(self.corpus).__name__, rule, remedy)

    def _render(self) -> PictureRendering:
        refuse_token(self.images, self.tokenizer)
        settings = (self.tokenizer, self.chat, self.sequence_length)
        return PictureRendering(self.images, self.corpus.pictures, *settings)

    def conversations(self, split: Split, most: int) -> list[Conversation]:
        """The first conversations of a split."""
        return list(islice(self.corpus.conversations(split), most))

    @property
    def order(self) -> RowOrder:  # type: ignore[override]
        rows = self._packed("train", self.sequence_length)
        return DealtOrder(len(rows), self.batch_size, self.seed, rows.row_tiles, self._share()[1])

    def _packed(self, split: Split, length: int) -> PictureRows:
        return cast("PictureRows", super()._packed(split, length))

    def _make_rows(self, split: Split, length: int) -> PictureRows:
        sights, stream = self._sights(split), self._streams[split]
        return PictureRows(self.images, sights, self.row_tiles, stream, length, self.tokenizer.token_bytes())

    def _sights(self, split: Split) -> Sights:
        numbers = [len(self._streams[each].starts) for each in SPLITS]
        last = sum(numbers[: SPLITS.index(split) + 1])
        tiles = np.array(self._pack().vocabulary["tiles"], dtype=np.int64)[
            last - len(self._streams[split].starts) : last
        ]
        return Sights(list(self.corpus.conversations(split)), tiles, self.corpus.pictures)

    def _pack(self) -> Packed:
        self.rendering.tiles.clear()  # of a preparation that failed
        return super()._pack()

    def _check_lengths(self) -> None:
        super()._check_lengths()
        if self.row_tiles is None:
            return
        for sights in map(self._sights, SPLITS):
            most = int(sights.tiles.max(initial=0))
            if most > self.row_tiles:
                where = sights.conversations[int(sights.tiles.argmax())].where
                rule = f"{where} has {most} tiles of pictures, and a conversation is never cut"
                raise ConfigError("data.row_tiles", self.row_tiles, rule, f"Set data.row_tiles={most} or more")

    def _describe(self) -> str:
        tiles = self._packed("train", self.sequence_length).row_tiles
        return f"{super()._describe()}; {tiles.mean():.1f} tiles of pictures a row, at most {tiles.max(initial=0)}"

    def _further(self) -> list[tuple[str, Any, Any]]:
        return [*super()._further(), ("row_tiles", self.row_tiles, None)]
