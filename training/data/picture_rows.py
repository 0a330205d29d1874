"""Conversations with pictures: places in the text for their embeddings, and rows with their tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blocks.images.base import Images
from blocks.tiling.base import Grid
from registry.errors import ConfigError
from training.data.chat.base import Message, Piece, encode
from training.data.conversations import Conversation
from training.data.order import PADDING
from training.data.packing import Ints, Stream
from training.data.picture_conversations import WORD
from training.data.pictures import tiles_of
from training.data.rendering import Rendering
from training.data.rows import Rows

if TYPE_CHECKING:
    from PIL.Image import Image

Open = Callable[[Conversation], Sequence["Image"]]  # the pictures of a conversation


class PictureRendering(Rendering):
    """Encodes conversations whose messages hold ``<image>`` for each picture, and the number of each in front.

    A picture has as many places as the tiling counts. Where a conversation is shortened to whole turns, pictures of the
    turns that are left out are left out too; a picture is never cut.

    Args:
        images: the image side of the model
        open_pictures: opens those of a conversation
        settings: those of ``Rendering``
    """

    def __init__(self, images: Images, open_pictures: Open, *settings: Any) -> None:
        super().__init__(*settings)
        self.images, self.open_pictures = images, open_pictures

    def fingerprint(self) -> str:
        tiling = {k: v for k, v in vars(self.images.tiling).items() if isinstance(v, int | str)}
        parts = [super().fingerprint(), type(self.images.tiling).__qualname__, tiling, self.images.image_token]
        return hashlib.sha256(json.dumps([*parts, self.images.vision.tile]).encode()).hexdigest()

    def encode(self, text: str) -> npt.NDArray[Any]:
        ids = super().encode(text)
        if not len(ids):  # every document of the cache is the conversation of its number
            _refuse(Conversation.from_json(text), "not even its first turns fit in data.sequence_length", "Raise it")
        return ids

    def encoded(
        self, conversation: Conversation, messages: Sequence[Message]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        whole = len(messages) == len(conversation.messages)
        return self._encoded(conversation, self.chat.render(messages, conversation.tools), whole)

    def prompt(self, conversation: Conversation, messages: Sequence[Message]) -> list[int]:
        """Ids of the first messages of a conversation, up to where the model answers."""
        return self._encoded(conversation, self.chat.open(messages, conversation.tools), False)[0].tolist()

    def _encoded(
        self, conversation: Conversation, pieces: Sequence[Piece], whole: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        grids = grids_of(self.images, self.open_pictures(conversation))
        counts, ids, scored = [self.images.tiling.count(grid) for grid in grids], [], []
        texts: list[Piece] = []

        def flush(places: int = 0) -> None:
            for found, are_scored in (encode(texts, self.tokenizer), self._places(places)):
                ids.append(found)
                scored.append(are_scored)
            texts.clear()

        for piece in pieces:
            first, *others = [piece.text] if piece.special else piece.text.split(WORD)
            texts.append(Piece(first, piece.special, piece.scored))
            for text in others:
                if piece.scored or not counts:
                    rule = "an answer holds <image>" if piece.scored else "it has more <image> than pictures"
                    _refuse(conversation, rule)
                flush(counts.pop(0))
                texts.append(Piece(text, scored=piece.scored))
        flush()
        if counts and whole:
            _refuse(conversation, f"{len(counts)} of its pictures have no <image> in a message")
        return np.concatenate(ids), np.concatenate(scored)

    def _places(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        return np.full(count, self.images.image_token, dtype=np.int64), np.zeros(count, dtype=np.bool_)


def _refuse(
    conversation: Conversation, rule: str, remedy: str = 'Write one <image> in a user\'s message for each of "images"'
) -> NoReturn:
    raise ConfigError("data.corpus.files", conversation.where, rule, remedy)


def grids_of(images: Images, pictures: Sequence[Image]) -> list[Grid]:
    """The grid of each picture of a conversation."""
    return [images.tiling.grid(*picture.size, len(pictures)) for picture in pictures]


class PictureRows(Rows):
    """Batches of packed conversations with the tiles of their pictures.

    A batch has ``tiles`` [N,3,P,P] uint8 and ``grids`` [M,2] beside those of ``Rows``, in the order of their places.
    One without pictures has one blank tile and no grid: every process runs the tower in every step.

    Args:
        images: the image side of the model
        conversations: of the split, as the stream has them
        open_pictures: opens those of a conversation
        settings: those of ``Rows``
    """

    def __init__(
        self,
        images: Images,
        conversations: Sequence[Conversation],
        open_pictures: Open,
        stream: Stream,
        sequence_length: int,
        token_bytes: Ints,
    ) -> None:
        super().__init__(stream, sequence_length, token_bytes)
        self.images, self.conversations, self.open_pictures = images, conversations, open_pictures

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        batch = super().__getitems__(rows)
        tiles: list[npt.NDArray[np.uint8]] = []
        grids: list[Grid] = []
        for item in (item for row in rows if row != PADDING for item in self.rows[row]):
            pictures = self.open_pictures(self.conversations[item])
            left = self._places(item)
            for picture, grid in zip(pictures, grids_of(self.images, pictures), strict=True):
                if not left:  # of a turn that was left out
                    break
                left -= self.images.tiling.count(grid)
                tiles.append(tiles_of(picture, grid, self.images.vision, self.images.tiling))
                grids.append(grid)
        P = self.images.vision.tile
        whole = np.concatenate(tiles) if tiles else np.zeros((1, 3, P, P), dtype=np.uint8)
        return {**batch, "tiles": torch.from_numpy(whole), "grids": torch.tensor(grids, dtype=torch.int64).view(-1, 2)}

    __getitem__ = __getitems__

    def _places(self, item: int) -> int:
        first, length = int(self.stream.starts[item]), int(self.lengths[item])
        return int((self.stream.tokens[first : first + length] == 2 * self.images.image_token).sum())
