"""Answers that are errors, of OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from blockwright.registry import BlockError, ConfigError

LONGEST = 100  # characters of a client's value that a message repeats


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP
        message: the rule, and what to write instead
        param: the field at fault
        code: of OpenAI's, for programs
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def shown(value: Any) -> str:
    """A client's value in a message: short, and in ASCII, so that any message can be sent and logged."""
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def shown_name(name: str) -> str:
    """A client's name of a field, as ``shown``: half a character could not be sent."""
    return name[:LONGEST].encode("ascii", "backslashreplace").decode()


def refused(error: ConfigError | BlockError, param: str) -> RefusedError:
    """The refusal of a request that this project's own checks refuse."""
    return RefusedError(400, f"{param} = {shown(error.value)}: {error.rule}. {error.remedy}", param, "invalid_value")
