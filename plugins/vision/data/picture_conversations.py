"""Conversations with pictures as a corpus: JSON lines or Parquet; boxes in their text."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blockwright.plugins.vision.data.pictures import Files, no_file
from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import BelowOne, Whole
from blockwright.training.data.conversations import Conversation, ConversationCorpus, Conversations, read_record, refuse
from blockwright.training.data.corpus import LEFT_OUT
from blockwright.training.data.fingerprint import digest, of_file, state

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in thousandths of the picture
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"(?:[\])]|$)")


def boxes(text: str) -> list[Box]:
    """Every four numbers in brackets, closed or cut off at the end, in order of their corners and within the picture.

    Malformed ones, with fewer or more numbers, are passed over.
    """
    found = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (min(max(float(n), 0.0), 999.0) for n in match.groups())
        found.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return found


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


WORD = "<image>"
UNREAD = ("image", "picture", "pictures", "video", "videos", "audio", "audios")  # columns that records elsewhere have


class Judged(NamedTuple):
    """What an answer about pictures is worth.

    kind: of the question, ``read``
    group: of the pictures, by which figures are divided too; empty for none
    figures: each from 0 to 1; of a kind of question always the same ones, but where one means nothing
    """

    kind: str
    group: str
    figures: Mapping[str, float]


class PictureCorpus(ConversationCorpus):
    """Conversations whose messages hold ``<image>`` where a picture stands."""

    def judge(self, conversation: Conversation, question: str, answer: str, truth: str) -> Judged:
        """Compare an answer that a model gave to a question of a conversation with the true one."""
        return Judged("answer", "", {"exact": float(answer.strip() == truth.strip())})

    @abstractmethod
    def pictures(self, conversation: Conversation) -> Sequence[Image]:
        """The pictures of a conversation in order, in RGB; each may be opened when it is asked for."""


@enforced("data.corpus")
class PictureConversations(Conversations, PictureCorpus):
    """Files of conversations with pictures, in the form of ms-swift, TRL and Hugging Face ``datasets``.

    A record is one of ``Conversations`` with ``images``, a list of paths or of mappings with ``path``. A content is
    text with ``<image>`` for each picture, or a list of parts, ``{"type": "image"}`` and
    ``{"type": "text", "text": …}``.

    Args:
        folder: that paths of pictures are relative to, and that holds them all; null for that of each file
        files, …: as for ``Conversations``
    """

    def __init__(
        self,
        files: str | list[str],
        val_fraction: BelowOne = 0.05,
        test_fraction: BelowOne = 0.05,
        split_seed: Whole = 0,
        folder: str | None = None,
    ) -> None:
        super().__init__(files, val_fraction, test_fraction, split_seed)
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError("data.corpus.folder", folder, "there is no such folder", "Name that of the pictures")

    def pictures(self, conversation: Conversation) -> Sequence[Image]:
        return Files(conversation.where, [Path(path) for path in conversation.columns["images"]])

    def read(self, record: Any, where: str) -> Conversation:
        return read_record(record, where)

    def check(self) -> None:
        super().check()
        shown = ((each.where, Path(p)) for each in self._all() for p in each.columns["images"])
        for where, path in shown if self.is_small() else ():
            if fault := no_file(path):
                rule = f"its picture {str(path)[:300]} {fault}"
                raise ConfigError("data.corpus.files", where, rule, "Correct the path")

    def fingerprint(self) -> str:
        """Of pictures the contents too, whatever their names; each file is read once."""
        shown = list({Path(path): None for each in self._all() for path in each.columns["images"]})
        with ThreadPoolExecutor() as threads:
            contents = list(threads.map(lambda path: None if no_file(path) else of_file(path), shown))
        order = {path: number for number, path in enumerate(shown)}
        which = [[order[Path(path)] for path in each.columns["images"]] for each in self._all()]
        left_out = {**LEFT_OUT, "folder": "the contents of pictures are compared, wherever they are"}
        return digest(state(self, left_out), list(map(of_file, self._paths)), contents, which)

    def _records_of(self, path: Path) -> Iterator[tuple[str, Any]]:
        folder = self.folder or path.parent
        for where, record in super()._records_of(path):
            yield where, _resolved(record, where, folder) if isinstance(record, Mapping) else record


def _resolved(record: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """A record with paths of its pictures, and texts for parts."""
    for key in UNREAD:
        if record.get(key):
            refuse(where, f'"{key}" is not read', 'List the paths of pictures in "images"')
    given = record.get("images")
    if not isinstance(given, list | None):
        refuse(where, f'"images" must be a list of paths: {str(given)[:80]}', 'Write "images": ["a.png"]')
    made = {**record, "images": [str(_path(each, where, folder)) for each in given or []]}
    for key in ("messages", "prompt", "completion"):
        if isinstance(record.get(key), list):
            made[key] = [_text(turn, where) if isinstance(turn, Mapping) else turn for turn in record[key]]
    return made


def _path(given: Any, where: str, folder: Path) -> Path:
    """The file of a picture, in the folder also behind symbolic links: records may come from other people."""
    name = given.get("path") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or not name:
        inside = isinstance(given, Mapping) and given.get("bytes") is not None
        rule = "a picture is stored in the record" if inside else f"a picture needs a path, a text: {str(given)[:80]}"
        refuse(where, rule, 'Save it as a file, and write "images": ["a.png"]')
    if "://" in name or name.startswith("data:"):
        refuse(where, f"{name[:80]} is an address, and pictures are read from files", "Fetch it first")
    try:
        path = folder / name
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        refuse(where, f"{name[:80]!r} is no path of a file ({error})", "Correct the path")
    if not is_inside:
        rule = f"its picture {name} is outside {folder}"
        refuse(where, rule, "Name the folder that holds all pictures: data.corpus.folder=…")
    return path


def _text(turn: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parts = turn.get("content")
    if not isinstance(parts, list):
        return turn
    return {**turn, "content": "".join(_part(part, where) for part in parts)}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image" and not any(value for key, value in part.items() if key not in ("type", "text")):
        return WORD
    rule = f"a part of a content is no text and no image: {str(part)[:80]}"
    remedy = 'Write {"type": "text", "text": "…"} or {"type": "image"}, and the path of its picture in "images"'
    refuse(where, rule, remedy)
