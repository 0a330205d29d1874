"""Chat templates of models: Jinja, rendered in one process, which is killed where one takes too long.

It is the only process in which a template runs. All formats of a program share it, so it is started once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from blockwright.registry import ConfigError, register
from blockwright.registry.errors import require
from blockwright.registry.limits import read_text
from blockwright.registry.schema import Place
from blockwright.training.answering import AnswerError, Answering, StartError
from blockwright.training.data.chat.formats import (
    Chat,
    Message,
    Piece,
    Tools,
    UnavailableError,
    answered,
    encode_special,
)
from blockwright.training.data.chat.template import CLOSE, HIDDEN, OPEN
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

SECONDS = 10.0  # of computing, to compile a template and to render a conversation
WITHIN = 60.0  # seconds that pass meanwhile
MEMORY = 2**30  # bytes, for the same, beside what the process has when it starts
START = 30.0  # seconds that a conversation waits for the process, where it has to start again
LONGEST = 2**25  # characters of a rendered conversation
LONGEST_ANSWER = 6 * LONGEST + 1000  # bytes of an answer at most: a control character has six in JSON

PROCESS = Answering(
    "blockwright.training.data.chat.template:prepare",
    str(MEMORY),
    str(LONGEST),
    seconds=SECONDS,
    within=WITHIN,
    start=START,
    longest=LONGEST_ANSWER,
)


class TemplateError(Exception):
    """A template is none, refuses what it is given, or takes too much; in its own words."""


class NotStartedError(Exception):
    """The process does not run, which is no fault of a template."""


def check(text: str) -> None:
    """Compile a template; first start the process, however long that takes.

    Raises:
        TemplateError: it is no template, or takes too much: Jinja computes constant expressions when it compiles
        NotStartedError
    """
    try:
        PROCESS.begin()
    except StartError as error:
        raise NotStartedError(str(error)) from None
    _asked(text, None)


def render(text: str, values: Mapping[str, Any]) -> str:
    """What a template writes for values of its variables.

    Raises:
        TemplateError: it raises an error, or takes too much
        NotStartedError
    """
    return _asked(text, values)


def _asked(text: str, values: Mapping[str, Any] | None) -> str:
    try:
        answer = PROCESS.ask([text, values])
    except StartError as error:
        raise NotStartedError(str(error)) from None
    except AnswerError as error:
        raise TemplateError(str(error)) from None
    if (written := answer.get("text")) is None:
        raise TemplateError(str(answer.get("refused")))
    return str(written)


ANSWER = "An example of an answer"
REMEDY = "Name a file with {% generation %} around the answers: data.chat.template=FILE; or use data/chat=chatml"


@register("chat", "jinja")
class Jinja(Chat):
    """The Jinja template of an imported tokenizer, or of a file.

    What is scored lies between ``{% generation %}`` and ``{% endgeneration %}``, as in transformers; few published
    templates have these marks, and without them training refuses a template. Templates run in Jinja's sandbox and in a
    process of their own, with ``messages``, ``bos_token``, ``eos_token``, ``add_generation_prompt``, ``tools`` (null
    without any), ``raise_exception`` and ``tojson``, for at most 10 seconds and in 1 GiB of memory a conversation.
    Unlike transformers, the words of special tokens in messages and tools are encoded as ordinary text, and
    ``strftime_now`` is missing: a text would depend on the day.

    Args:
        template: file of the template; null for the one beside the tokenizer. Checkpoints hold its text
    """

    version: ClassVar[int] = 2  # before, no template saw reasoning_content
    left_out: ClassVar[Mapping[str, str]] = {"file": "its text is compared"}

    def __init__(self, template: Place | None = None) -> None:
        self.file = template
        self._text, self._words, self._special = "", dict[str, str](), list[str]()

    def prepare(self, tokenizer: Tokenizer) -> None:
        require("lab", "jinja2", path="data.chat", value="jinja")
        self._text = read_text(Path(self.file), "data.chat.template", REMEDY) if self.file else _of(tokenizer)
        inverse = {i: word for word, i in tokenizer.special_words.items()}
        named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        self._words = {name: inverse.get(i, "") if i is not None else "" for name, i in named.items()}
        self._special = [word for word in sorted(tokenizer.special_words, key=len, reverse=True) if word]
        try:
            check(self._text)
        except TemplateError as error:
            rule = f"is no Jinja template ({error})"
            raise ConfigError("data.chat.template", self.file, rule, REMEDY) from None
        except NotStartedError as error:
            raise _unavailable(error) from None

    def check_scores(self) -> None:
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self._text):
            rule = "the template marks no answers with {% generation %}, so no token would be scored"
            raise ConfigError("data.chat.template", self.file, rule, REMEDY)

    def turn(self, message: Message) -> list[Piece]:
        raise NotImplementedError("a template renders whole conversations")

    def header(self) -> list[Piece]:
        raise NotImplementedError("a template renders whole conversations")

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Piece]:
        return self._pieces(messages, tools, add_generation_prompt=False)

    def open(self, messages: Sequence[Message], tools: Tools = ()) -> list[Piece]:
        return self._pieces(messages, tools, add_generation_prompt=True)

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Those of the tokenizer, and the special token after the content of an answer."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
        pieces = self.render(talk)
        after = max((n for n, piece in enumerate(pieces, 1) if ANSWER in piece.text), default=len(pieces))
        own = {encode_special(piece.text, tokenizer) for piece in pieces[after : after + 1] if piece.special}
        return tokenizer.ends | {i for i in own if i is not None}

    def template(self) -> str | None:
        return self._text if self.file else None

    def made(self) -> list[Any]:
        return [self._text, self._words, self._special]

    def _pieces(self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool) -> list[Piece]:
        """Render, then find the template's own special tokens; those in messages are hidden from it meanwhile."""
        known = [_with_older_names(message) for message in messages]
        values = {"messages": self._hide(known), "tools": self._hide(list(tools)) or None, **self._words}
        try:
            text = render(self._text, {**values, "add_generation_prompt": add_generation_prompt})
        except TemplateError as error:
            rule = f"the template refuses a conversation ({error})"
            raise ConfigError("data.chat", "jinja", rule, "Fix the conversation, or the template") from None
        except NotStartedError as error:
            raise _unavailable(error) from None
        answers = iter([answered(message) for message in messages if message["role"] == "assistant"])
        pieces: list[Piece] = []
        for i, part in enumerate(re.split(f"[{OPEN}{CLOSE}]", text)):
            pieces += self._split(part, i % 2 == 1 and next(answers, True))
        return pieces

    def _split(self, text: str, scored: bool) -> list[Piece]:
        found = re.split("|".join(f"({re.escape(word)})" for word in self._special), text) if self._special else [text]
        special = set(self._special)
        return [
            Piece(part if part in special else part.replace(HIDDEN, ""), part in special, scored)
            for part in found
            if part
        ]

    def _hide(self, content: Any) -> Any:
        """Break every special token in the texts of plain data by a character that is removed after rendering."""
        if isinstance(content, Mapping):
            return {self._hide(key): self._hide(value) for key, value in content.items()}
        if isinstance(content, list):
            return [self._hide(each) for each in content]
        if not isinstance(content, str):
            return content
        content = re.sub(f"[{OPEN}{CLOSE}{HIDDEN}]", "", content)
        for word in self._special:
            content = content.replace(word, word[:1] + HIDDEN + word[1:])
        return content


def _unavailable(error: Exception) -> UnavailableError:
    rule = f"the process that renders templates does not run: {error}"
    return UnavailableError("data.chat", "jinja", rule, "Try again, or look at what keeps this machine busy")


def reread(node: Any, tokenizer: Tokenizer) -> Any:
    """The node of a format in a checkpoint, which names no file: its template's text is beside the tokenizer."""
    named = isinstance(node, Mapping) and node.get("name") == "jinja" and has_template(tokenizer)
    return "jinja" if named else node


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether there is a template beside a tokenizer."""
    return _beside(tokenizer) is not None


def _of(tokenizer: Tokenizer) -> str:
    """The template beside a tokenizer.

    Raises:
        ConfigError: there is none
    """
    text = _beside(tokenizer)
    if text is None:
        rule = f"the {tokenizer.kind} tokenizer has no chat template beside it"
        raise ConfigError("data.chat", "jinja", rule, REMEDY)
    return text


def _beside(tokenizer: Tokenizer) -> str | None:
    files = tokenizer.companions
    older = (
        companions.values(files, name).get("chat_template") for name in (companions.SETTINGS, "chat_template.json")
    )
    text: Any = files.get("chat_template.jinja") or next(filter(None, older), None)
    if isinstance(text, list):  # several by name
        named = [each for each in text if isinstance(each, Mapping)]
        text = next((each.get("template") for each in named if each.get("name") == "default"), None)
    return text if isinstance(text, str) else None


def _with_older_names(message: Message) -> Message:
    """A message whose reasoning is also under the name that templates of gpt-oss read, as in transformers."""
    thoughts = message.get("reasoning_content")
    return message if thoughts is None else {**message, "thinking": thoughts}
