"""Conversations with pictures as a corpus: JSON lines or Parquet with ``messages`` and ``images``."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.enforcing import enforced
from training.data.conversations import Conversation, ConversationCorpus, Conversations
from training.data.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

WORD = "<image>"


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
    def pictures(self, conversation: Conversation) -> list[Image]:
        """The pictures of a conversation in order, in RGB."""


@enforced("data.corpus")
class PictureConversations(Conversations, PictureCorpus):
    """Files of conversations with pictures, in the form of ms-swift, TRL and Hugging Face ``datasets``.

    A record is one of ``Conversations`` with ``images``, a list of paths relative to its file, or of mappings with
    ``path``. A content is text with ``<image>`` for each picture, or a list of parts, ``{"type": "image"}`` and
    ``{"type": "text", "text": …}``.
    """

    def pictures(self, conversation: Conversation) -> list[Image]:
        return [open_picture(Path(path)) for path in conversation.columns.get("images", [])]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for conversation in self._all():
            for path in map(Path, conversation.columns.get("images", [])):
                digest.update(f"{path.name} {path.stat().st_size if path.is_file() else None};".encode())
        return digest.hexdigest()

    def _records(self) -> Iterator[tuple[str, Any]]:
        folders = {path.name: path.parent for path in self._paths}
        for where, record in super()._records():
            folder = folders[where.rpartition(":")[0]]
            yield where, _resolved(record, folder) if isinstance(record, Mapping) else record


def _resolved(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A record with paths of its pictures, and texts for parts."""
    given = record.get("images") or []
    paths = [each.get("path") if isinstance(each, Mapping) else each for each in given]
    made = {**record, "images": [str(folder / str(path)) for path in paths]}
    for key in ("messages", "prompt", "completion"):
        if isinstance(record.get(key), list):
            made[key] = [_text(turn) if isinstance(turn, Mapping) else turn for turn in record[key]]
    return made


def _text(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = turn.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        return turn
    words = [WORD if part.get("type") == "image" else str(part.get("text") or "") for part in parts]
    return {**turn, "content": "".join(words)}
