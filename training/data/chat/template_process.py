"""Templates are rendered in one process, which is killed where one takes too long, whatever it does.

It is the only one in which a template runs. All formats of a program share it, so it is started once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.training.answering import AnswerError, Answering, StartError

SECONDS = 10.0  # of computing, to compile a template and to render a conversation
WITHIN = 60.0  # seconds that pass meanwhile
MEMORY = 2**30  # bytes, for the same, beside what the process has when it starts
START = 30.0  # seconds that a conversation waits for the process, where it has to start again
LONGEST = 2**25  # characters of a rendered conversation
ANSWER = 6 * LONGEST + 1000  # bytes of an answer at most: a control character has six in JSON

PROCESS = Answering(
    "blockwright.training.data.chat.template:prepare",
    str(MEMORY),
    str(LONGEST),
    seconds=SECONDS,
    within=WITHIN,
    start=START,
    longest=ANSWER,
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
