"""Who visits the page in tests, and what answers in the place of the process that composes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.training.answering import AnswerError

PORT, TOKEN = 8123, "a-token"
HOST = f"127.0.0.1:{PORT}"


class Bench:
    """Answers in this process with the question."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("preset") == "late":
            raise AnswerError("took longer than 1 seconds")
        return {"asked": dict(request)}
