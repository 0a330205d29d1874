"""Conversations with pictures: places in the text for their embeddings, and rows with their tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockwright.blocks.compose import build_inputs, read
from blockwright.plugins.vision.data.picture_conversations import WORD
from blockwright.plugins.vision.data.pictures import SETTING, tiles_of
from blockwright.plugins.vision.images import Images
from blockwright.plugins.vision.tiling import Grid, Tiling
from blockwright.registry.build import add_one
from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.formats import Message, Piece, encode
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.fingerprint import digest, state
from blockwright.training.data.order import PADDING
from blockwright.training.data.packing import Ints
from blockwright.training.data.rows import LEFT_OUT, Rendering, Rows, best_fit
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

LEFT_OUT_TOO = {
    "images": "its tiling, token and tile are compared; tower and projector compute embeddings, not how many there are",
    "open_pictures": "the corpus compares the contents of pictures",
    "tiles": "it is a result",
}
Open = Callable[[Conversation], Sequence["Image"]]  # the pictures of a conversation


class Sights(NamedTuple):
    """What the conversations of a split show.

    conversations: in the order of the stream
    tiles: of each [conversations]
    open_pictures: opens those of a conversation
    """

    conversations: Sequence[Conversation]
    tiles: Ints
    open_pictures: Open


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
        self.tiles: list[int] = []  # of each conversation encoded
        self._opened: tuple[Conversation | None, list[Grid]] = (None, [])

    def fingerprint(self) -> str:
        left_out = {**LEFT_OUT, **LEFT_OUT_TOO}
        parts = [*self._shaping(), state(self, left_out), state(self.images.tiling)]
        return digest(*parts, self.images.image_token, self.images.vision.tile)

    def encode(self, text: str) -> npt.NDArray[Any]:
        ids = super().encode(text)
        if not len(ids):  # every document of the cache is the conversation of its number
            _refuse(Conversation.from_json(text), "not even its first turns fit in data.sequence_length", "Raise it")
        seen = shown(self.images.tiling, self._opened[1], int((ids == 2 * self.images.image_token).sum()))
        self.tiles.append(sum(self.images.tiling.n_tiles(grid) for grid in seen))
        return ids

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "tiles": self.tiles}

    def check(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        super().check(texts)
        for each in (each for text in texts for each in self.read(text)):
            if "images" in each.columns:  # else only opening them says how many there are
                _agree(each, self.chat.render(each.messages, each.tools), len(each.columns["images"]), True)

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
        counts = list(map(self.images.tiling.count, self._grids(conversation)))
        _agree(conversation, pieces, len(counts), whole)
        ids, scored, texts = [], [], list[Piece]()

        def flush(places: int = 0) -> None:
            for found, are_scored in (encode(texts, self.tokenizer), self._places(places)):
                ids.append(found)
                scored.append(are_scored)
            texts.clear()

        for piece in pieces:
            first, *others = [piece.text] if piece.special else piece.text.split(WORD)
            texts.append(Piece(first, piece.special, piece.scored))
            for text in others:
                flush(counts.pop(0))
                texts.append(Piece(text, scored=piece.scored))
        flush()
        return np.concatenate(ids), np.concatenate(scored)

    def _grids(self, conversation: Conversation) -> list[Grid]:
        if self._opened[0] is not conversation:  # its pictures are opened once, however it is shortened
            self._opened = (
                conversation,
                grids_of(self.images, self.open_pictures(conversation), where=conversation.where),
            )
        return self._opened[1]

    def _places(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        return np.full(count, self.images.image_token, dtype=np.int64), np.zeros(count, dtype=np.bool_)


def _agree(conversation: Conversation, pieces: Sequence[Piece], n_pictures: int, whole: bool) -> None:
    """Refuse another number of ``<image>`` than of pictures, which may be more where turns are left out."""
    words = sum(piece.text.count(WORD) for piece in pieces if not piece.special)
    if any(WORD in piece.text for piece in pieces if piece.scored):
        _refuse(conversation, "an answer holds <image>")
    if words > n_pictures:
        _refuse(conversation, f"it has more <image> than pictures ({words}, {n_pictures})")
    if words < n_pictures and whole:
        _refuse(conversation, f"{n_pictures - words} of its pictures have no <image> in a message")


def _refuse(
    conversation: Conversation, rule: str, remedy: str = 'Write one <image> in a user\'s message for each of "images"'
) -> NoReturn:
    raise ConfigError(SETTING, conversation.where, rule, remedy)


def grids_of(images: Images, pictures: Sequence[Image], path: str = SETTING, where: str = "") -> list[Grid]:
    """The grid of each picture of a conversation; as ``grid_of``."""
    return [grid_of(images, picture, len(pictures), path, where) for picture in pictures]


def grid_of(images: Images, picture: Image, n_pictures: int, path: str = SETTING, where: str = "") -> Grid:
    """The grid of a picture.

    Args:
        images: the image side of the model
        picture: of a conversation
        n_pictures: of the conversation
        path, where: of it, for messages

    Raises:
        ConfigError: a picture so long that nothing of it would be left on a tile
    """
    P, (width, height) = images.vision.tile, picture.size
    if round(P * min(width, height) / max(width, height)) < 1:
        rule = f"a picture of {width} × {height} pixels is thinner than a pixel on a tile of {P}"
        raise ConfigError(path, where or f"{width} × {height}", rule, "Cut it into several")
    return images.tiling.grid(width, height, n_pictures)


def images_of(model: Any) -> Images:
    """The image side of a composition, on the meta device: what its tiling counts, without building the rest.

    Raises:
        ConfigError: an error in it, or there is none
    """
    complete = read(model)
    with torch.device("meta"):
        images = build_inputs(complete).get("images")
    if not isinstance(images, Images):
        raise ConfigError("model.images", None, "this model reads text alone", add_one("model/images", "images"))
    return images


def refuse_token(images: Images, tokenizer: Tokenizer) -> None:
    """Refuse an image token that is the id of another token.

    Raises:
        ConfigError: at ``model.images.image_token``
    """
    token = images.image_token
    if token == tokenizer.eos or (tokenizer.fitted and tokenizer.token_bytes()[token : token + 1].any()):
        rule = "is the id of another token of this tokenizer"
        raise ConfigError("model.images.image_token", token, rule, "Use an id that the tokenizer leaves free")


def shown(tiling: Tiling, grids: Sequence[Grid], places: int) -> list[Grid]:
    """The grids of the first pictures, which have so many places; those of turns that were left out have none."""
    ends = np.cumsum([0, *map(tiling.count, grids)])
    return list(grids[: int(np.searchsorted(ends, places))])


class PictureRows(Rows):
    """Batches of packed conversations with the tiles of their pictures.

    A batch has ``images.tiles`` [N,3,P,P] uint8 and ``images.grids`` [M,2] beside those of ``Rows``, in the order of
    their places.
    One without pictures has one blank tile and no grid: every process runs the tower in every step.

    Args:
        images: the image side of the model
        sights: those of the split, as the stream has them
        most_tiles: of a row; None for as many as fit
        settings: those of ``Rows``
    """

    def __init__(self, images: Images, sights: Sights, most_tiles: int | None, *settings: Any) -> None:
        self.images, self.sights, self.most_tiles = images, sights, most_tiles
        super().__init__(*settings)
        self.row_tiles: Ints = np.array([sights.tiles[row].sum() for row in self.rows], dtype=np.int64)

    def _arrange(self) -> list[list[int]]:
        if self.most_tiles is None:
            return super()._arrange()
        return best_fit(self.lengths, self.sequence_length, self.sights.tiles, self.most_tiles)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        batch = super().__getitems__(rows)
        tiles: list[npt.NDArray[np.uint8]] = []
        grids: list[Grid] = []
        for item in (item for row in rows if row != PADDING for item in self.rows[row]):
            for picture, grid in self._seen(item):
                tiles.append(tiles_of(picture, grid, self.images.vision, self.images.tiling))
                grids.append(grid)
        P = self.images.vision.tile
        whole = np.concatenate(tiles) if tiles else np.zeros((1, 3, P, P), dtype=np.uint8)
        return {
            **batch,
            "images.tiles": torch.from_numpy(whole),
            "images.grids": torch.tensor(grids, dtype=torch.int64).view(-1, 2),
        }

    __getitem__ = __getitems__

    def _seen(self, item: int) -> Iterator[tuple[Image, Grid]]:
        """The pictures of a conversation that have places, and their grids; each is opened when it is asked for."""
        first, length = int(self.stream.starts[item]), int(self.lengths[item])
        places = int((self.stream.tokens[first : first + length] == 2 * self.images.image_token).sum())
        conversation = self.sights.conversations[item]
        pictures = self.sights.open_pictures(conversation) if places else []
        for picture in pictures if places else ():
            grid = grid_of(self.images, picture, len(pictures))
            places -= self.images.tiling.count(grid)
            yield picture, grid
            if places <= 0:
                break
        if places:
            _refuse(conversation, "its pictures have changed since its tokens were prepared", "Empty data.cache_dir")
