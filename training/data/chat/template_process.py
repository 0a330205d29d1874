"""A template in a process of its own, for programs that do other work meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.training.answering import Answer, AnswerError, Answering
from blockwright.training.data.chat import template
from blockwright.training.data.chat.template import Template, TemplateError

START = 30.0  # seconds for the process to start, and to compile the template
LATE = 2.0  # seconds beyond those of a template after which its process is killed
ANSWER = 12 * template.LONGEST  # bytes of an answer at most: six a character in JSON, and two of them beyond 16 bits


class TemplateProcess:
    """A ``Template`` whose limits hit no thread of this process, and hold in any thread.

    Args:
        text: of the template, which has been compiled once
    """

    def __init__(self, text: str) -> None:
        limit = template.SECONDS
        self.answering = Answering(_prepare, text, limit, seconds=limit + LATE, start=START, longest=ANSWER)

    def render(self, values: Mapping[str, Any]) -> str:
        """As ``Template.render``.

        Raises:
            TemplateError
        """
        try:
            answer = self.answering.ask(values)
        except AnswerError as error:
            raise TemplateError(str(error)) from None
        if (text := answer.get("text")) is None:
            raise TemplateError(str(answer.get("refused")))
        return str(text)


def _prepare(text: str, seconds: float) -> Answer:
    template.SECONDS = seconds
    compiled = Template(text)

    def answer(values: Mapping[str, Any]) -> dict[str, str]:
        try:
            return {"text": compiled.render(values)}
        except TemplateError as error:
            return {"refused": str(error)}

    return answer
