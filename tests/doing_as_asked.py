"""What a process of ``Answering`` does in tests; that process imports it by name."""

from __future__ import annotations

import os
import time
from typing import Any

from blockwright.training.answering import Answer


def prepare(greeting: str) -> Answer:
    """Answers that greet, or do what the question says."""

    def answer(question: Any) -> Any:
        match question:
            case {"sleep": seconds}:
                time.sleep(seconds)
            case {"end": code}:
                os._exit(code)
            case {"long": letters}:
                return {"text": "a" * letters}
            case {"list": _}:
                return [1]
        return {"text": f"{greeting} {question}", "process": os.getpid()}

    return answer


def refuse() -> Answer:
    """Fails to prepare."""
    os._exit(1)
