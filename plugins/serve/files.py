"""Files in a conversation, such as pictures, which a request brings with it: nothing is fetched, no path is read."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.input import Media
from blockwright.lab.attachment import Attachment, readable
from blockwright.lab.chat.conversation import ChatText
from blockwright.plugins.serve.body import Fields, RefusedError
from blockwright.registry import ConfigError

MOST = 16  # files of a request
MOST_BYTES = 2**23  # of all of them
NEUTRAL = {"detail": ("auto",)}


@dataclass
class Files:
    """The files of a request, in the order of their marks in its text.

    Args:
        kind: that the model reads; None for a model that reads text alone
    """

    kind: type[Attachment] | None
    contents: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, decoder: Decoder) -> Files:
        """None yet, of the kind that a model reads."""
        return cls(next(iter(readable(decoder).values()), None))

    @property
    def part(self) -> str | None:
        """The type of the parts of messages that are such files: ``image_url``."""
        return None if self.kind is None else f"{self.kind.word}_url"

    def take(self, fields: Fields) -> str:
        """The mark of a file, which is kept.

        Args:
            fields: of a part of a message, ``{"image_url": {"url": "data:image/png;base64,…"}}``

        Raises:
            RefusedError: it is an address, or no base64, or there are too many or too large ones
        """
        assert self.kind is not None and self.part is not None
        inner = Fields(fields.need(self.part, dict), f"{fields.where}{self.part}.")
        url = inner.need("url", str)
        inner.finish(NEUTRAL)
        head, _, data = url.partition(",")
        if not re.fullmatch(rf"data:{self.kind.word}/[\w.+-]+;base64", head):
            rule = f"must be data:{self.kind.word}/…;base64,…: this server fetches nothing"
            raise inner.refuse("url", url, rule, "unsupported_parameter")
        try:
            self.contents.append(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError):
            raise inner.refuse("url", url, "is no base64") from None
        if len(self.contents) > MOST or sum(map(len, self.contents)) > MOST_BYTES:
            rule = f"a request has at most {MOST} files, of {MOST_BYTES:,} bytes together"
            raise inner.refuse("url", url, rule, "request_too_large")
        return self.kind.mark

    def encode(self, decoder: Decoder, text: str, chat: ChatText) -> tuple[list[int], Media]:
        """The ids of a conversation with places for the files, and what these hold.

        Raises:
            RefusedError: a file cannot be read, or the template drops or repeats a mark
        """
        assert self.kind is not None
        with TemporaryDirectory(prefix="blockwright-") as folder:
            paths = [Path(folder) / f"{self.kind.word} {i}" for i in range(len(self.contents))]
            for path, content in zip(paths, self.contents, strict=True):
                path.write_bytes(content)
            try:
                (ids,), media = self.kind.of_files([str(path) for path in paths]).encode(decoder, [text], chat.encode)
            except ConfigError as error:
                rule = f"messages: {Path(str(error.value)).name}: {error.rule}".replace(f"{folder}/", "")
                raise RefusedError(400, rule, "messages", "invalid_value") from None
        return ids, media
