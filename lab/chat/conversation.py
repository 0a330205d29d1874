"""A conversation with a model: its turns, the prompt that the model continues, and both as text.

Some programs know only text: lm-evaluation-harness joins rendered conversations, prefixes and answers as strings, and
has them encoded later. A special token that were its mere word there could not be distinguished from the same word in a
question, so special tokens stand between marks that users cannot write. Which format a model speaks: ``own_format``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from blockwright import registry
from blockwright.blocks.checkpoint.source import read_start
from blockwright.blocks.generation.generate import TextStream
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.input import Media
from blockwright.lab.attachment import readable
from blockwright.lab.writer import Writer
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.data.chat.formats import BOS, EOS, Chat, Piece, encode
from blockwright.training.data.chat.jinja import has_template, reread
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

READ = "Name the format yourself, or resume the run for a step: its checkpoint then holds the text of its template"
MARK = "\ue003"  # a private-use character, removed from texts
_ASK, _ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
TALKS = ([_ASK], [{"role": "system", "content": "Be brief."}, _ASK], [_ASK, _ANSWER, _ASK])  # to compare formats by


class ChatText:
    """A chat format with a model's tokenizer.

    Args:
        name: a registered format: ``chatml``, ``jinja`` for the template beside the tokenizer, …; or a node with its
            settings
        words: the tokenizer
        path: of the name, for messages

    Attributes:
        ends: tokens that end an answer

    Raises:
        ConfigError: there is no such format, the tokenizer lacks its special tokens, or its template refuses an answer
    """

    def __init__(self, name: str | dict[str, Any], words: Tokenizer, path: str = "model_args.chat") -> None:
        self.words = words
        try:
            self.chat: Chat = registry.build("chat", Node(name, path), Scope({}, {}))
        except ConfigError as error:
            remedy = error.remedy if isinstance(name, str) else READ
            raise ConfigError(error.path.removesuffix(".name"), error.value, error.rule, remedy) from None
        try:
            self.chat.prepare(words)
            self.ends = self.chat.ends(words)
        except ConfigError as error:
            remedy = "Choose another format, or a tokenizer and a template that suit it"
            raise ConfigError(path, self.chat.node()["name"], error.rule, remedy) from None

    def render(self, messages: Sequence[dict[str, Any]], opened: bool = True) -> str:
        """Text of a conversation whose next turn is the model's; not ``opened``: whose last message it continues."""
        pieces = self.chat.open(messages if opened else messages[:-1])
        pieces = pieces if opened else [*pieces, Piece(messages[-1]["content"])]
        parts = [f"{MARK}{p.text}{MARK}" if p.special else p.text.replace(MARK, "") for p in pieces]
        return "".join([*parts, MARK * 2 if opened else ""])  # what follows is encoded apart, as in training

    def spelt(self, messages: Sequence[dict[str, Any]]) -> str:
        """``render`` for people, and for comparison: special tokens as their words."""
        words = {number: word for word, number in self.words.special_words.items()}
        names = {BOS: words.get(self.words.bos, ""), EOS: words.get(self.words.eos, "")}  # type: ignore[arg-type]
        return "".join(names.get(p.text, p.text) if p.special else p.text for p in self.chat.open(messages))

    def encode(self, text: str) -> list[int]:
        """Ids of a text that ``render`` began; one without marks is ordinary text."""
        pieces = [Piece(part, special=i % 2 == 1) for i, part in enumerate(text.split(MARK))]
        apart = [piece if piece.text or not piece.special else Piece("", scored=True) for piece in pieces]
        return encode(apart, self.words)[0].tolist()


def own_format(model: Path, words: Tokenizer) -> str | dict[str, Any] | None:
    """The format that a model speaks: that of the conversations it was trained on, else the template beside its
    tokenizer; None for a model without either.

    Args:
        model: a run's folder, a checkpoint or an imported folder
        words: its tokenizer
    """
    return format_of(model, words) or ("jinja" if has_template(words) else None)


def format_of(start: Path, words: Tokenizer) -> str | dict[str, Any] | None:
    """The format of the conversations that a run was trained on; None for other models. Arguments as ``own_format``."""
    try:
        data = (read_start(start).get("configuration") or {}).get("data") or {}
    except ConfigError:  # a model of another program, which has no such record
        return None
    return reread(data.get("chat"), words) if isinstance(data, dict) else None


def difference(trained: ChatText, words: Tokenizer) -> str | None:
    """Where the published template writes another text than the format of a training; None if nowhere.

    What a model is exported with is the template beside its tokenizer, which other programs then use.
    """
    try:
        published = ChatText("jinja", words)
        for talk in TALKS:
            ours, theirs = (form.spelt(talk) for form in (trained, published))
            if ours != theirs:
                n = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if len({*pair}) > 1)
                return f"after {ours[max(n - 20, 0) : n]!r} it writes {theirs[n : n + 40]!r}, not {ours[n : n + 40]!r}"
    except ConfigError as error:
        return f"it cannot be read: {error.rule}"
    return None


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
