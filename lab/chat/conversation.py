"""A conversation with a model: its turns, and the prompt that the model continues with an answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.generation.text_stream import TextStream
from blockwright.blocks.input import Media
from blockwright.lab.attachment import readable
from blockwright.lab.chat_text import ChatText
from blockwright.lab.writer import Writer
from blockwright.registry import ConfigError

USUAL_ROOM = 8192  # tokens, of a model that has positions for more


@dataclass(frozen=True)
class Turn:
    """A message of the user or the model, with the files that marks in it stand for."""

    role: str
    content: str
    files: tuple[str, ...] = ()

    def message(self) -> dict[str, Any]:
        """As chat formats take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Manner:
    """How answers are drawn.

    Args:
        new_tokens: of an answer, at most
        sampling: sampling parameters
        stops: strings that end an answer, excluded from it
        seed: the answer of number n, counted from 0, draws from seed + n
        room: tokens of a prompt with its answer; None for the model's positions, at most ``USUAL_ROOM``
        bits: of the caches' numbers, 8, 6 or 4; None for exact ones
    """

    new_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    seed: int = 0
    room: int | None = None
    bits: int | None = None


class Conversation:
    """Turns of a user and a model, answered in the model's chat format.

    The whole conversation is the prompt of each answer; what the caches hold of it is not read again
    (blocks/generation/memory.py). Where it leaves an answer less than a quarter of the room, or less than it may take,
    the oldest exchanges are left out until it fills at most half. The system message stays.

    Args:
        writer: the model
        chat: its format
        manner: how answers are drawn
        system: the system message; None for that of the format, if it has one

    Attributes:
        turns: the whole conversation, whether the model still sees it or not
        left_out: the first turns that the model does not see any more
        ended: why the last answer ended: ``end``, ``stop`` or ``length``; None if it was interrupted

    Raises:
        ConfigError: an attention of the model has no cache, or ``room`` is more than it has positions for
    """

    def __init__(self, writer: Writer, chat: ChatText, manner: Manner, system: str | None = None) -> None:
        self.writer, self.chat, self.manner = writer, chat, manner
        self.turns: list[Turn] = []
        self.left_out = 0
        self.ended: str | None = None
        self.room = _room(writer, manner.room)
        self._memory = writer.memory(self.room, manner.bits)
        self._answers = 0
        stops = writer.words.stop_tokens(manner.stops)
        self._stop_tokens = stops | chat.ends
        self.system: str | None = None
        self.instruct(system)

    def instruct(self, system: str | None) -> None:
        """Set the system message.

        Raises:
            ConfigError: the format has no form for it
        """
        before, self.system = self.system, system
        try:
            self._encoded([Turn("user", "?")])
        except ConfigError:
            self.system = before
            raise

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns, self.left_out = [], 0

    def say(self, text: str, files: Sequence[str] = ()) -> Generator[str, None, None]:
        """Add a message of the user, and yield the answer as it comes.

        Where the message is refused, it is not part of the conversation.

        Args:
            text: with a mark for each file
            files: in the order of the marks

        Raises:
            ConfigError: the message with an answer has no room, even alone; or the model cannot read it
        """
        return self._answer([*self.turns, Turn("user", text, tuple(files))])

    def retry(self) -> Generator[str, None, None]:
        """Take back the last answer, and yield another.

        Raises:
            ConfigError: there is no message to answer
        """
        kept = self.turns[: -1 if self.turns and self.turns[-1].role == "assistant" else None]
        if not kept:
            raise ConfigError("/retry", None, "there is no message to answer yet", "Write one")
        return self._answer(kept)

    def record(self) -> dict[str, Any]:
        """The conversation as a record of the files that ``data=chat`` trains on."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        found: dict[str, Any] = {"messages": [*system, *(turn.message() for turn in self.turns)]}
        if files := [file for turn in self.turns for file in turn.files]:
            (kind,) = readable(self.writer.decoder)
            found[kind] = files
        return found

    def _answer(self, turns: list[Turn]) -> Generator[str, None, None]:
        left_out, ids, media = self._fitting(turns)
        longest = min(self.manner.new_tokens, self.room - len(ids))
        tokens = self._memory.continued(
            ids,
            longest,
            self.manner.sampling,
            seed=self.manner.seed + self._answers,
            stop_tokens=self._stop_tokens,
            media=media,
        )
        self.turns, self.left_out, self.ended = turns, left_out, None
        self._answers += 1
        return self._pieces(tokens, longest)

    def _pieces(self, tokens: Iterator[int], longest: int) -> Generator[str, None, None]:
        stream, pieces, n = TextStream(self.writer.decode, self.manner.stops), list[str](), 0

        def put(piece: str) -> Iterator[str]:
            if piece:
                pieces.append(piece)
                yield piece

        try:
            for token in self.writer.sound(tokens):
                n += 1
                yield from put(stream.push(token))
                if stream.ended:
                    break
            yield from put(stream.close())
            self.ended = "stop" if stream.ended else "length" if n == longest else "end"
        finally:  # also where it is interrupted
            self.turns = [*self.turns, Turn("assistant", "".join(pieces))]

    def _fitting(self, turns: Sequence[Turn]) -> tuple[int, list[int], Media]:
        """How many of the first turns are left out, and the prompt of the others."""
        first = self.left_out
        reserve = min(self.manner.new_tokens, self.room // 4)
        ids, media = self._encoded(turns[first:])
        if len(ids) + reserve <= self.room:
            return first, ids, media
        for later in [n for n, turn in enumerate(turns) if turn.role == "user" and n > first]:
            first = later
            ids, media = self._encoded(turns[first:])
            if len(ids) <= self.room // 2:
                break
        if len(ids) >= self.room:
            rule = (
                f"the message is {len(ids)} tokens with its format, and there is room for {self.room} with the answer"
            )
            raise ConfigError("message", f"{turns[-1].content[:60]}…", rule, "Shorten it, or raise --context")
        return first, ids, media

    def _encoded(self, turns: Sequence[Turn]) -> tuple[list[int], Media]:
        """The ids of a prompt, and what its marks stand for."""
        system = [] if self.system is None else [Turn("system", self.system)]
        shown = [*system, *turns]
        text = self.chat.render([turn.message() for turn in shown])
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates
            rule = "is no text in UTF-8"
            raise ConfigError("message", ascii(shown[-1].content)[:60], rule, "Convert it to UTF-8") from None
        files = [file for turn in turns for file in turn.files]
        ids, media = self._with_files(text, files) if files else (self.chat.encode(text), {})
        if not ids:
            raise ConfigError("message", "", "is empty, but a model continues at least one token", "Write some text")
        self.writer.check_known(ids, "message", shown[-1].content[:60])
        return ids, media

    def _with_files(self, text: str, files: Sequence[str]) -> tuple[list[int], Media]:
        (attachment,) = readable(self.writer.decoder).values()
        (ids,), media = attachment.of_files(files).encode(self.writer.decoder, [text], self.chat.encode)
        return ids, media


def _room(writer: Writer, wanted: int | None) -> int:
    limit, trained = writer.decoder.position.limit, writer.decoder.config["max_positions"]
    if wanted is None:
        return min(limit or trained, trained, USUAL_ROOM)
    if limit is not None and wanted > limit:
        rule = f"the model has positions for {limit} tokens"
        raise ConfigError("--context", wanted, rule, f"Write at most {limit}, or leave it out")
    return wanted
