"""What a process of ``Answering`` does in tests; that process imports it by name."""

from __future__ import annotations

import math
import os
import sys
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
            case {"never": _}:
                return {"text": str(math.factorial(10**8))}  # compiled code, which looks for no signal
            case {"imported": module}:
                return {"text": str(module in sys.modules)}
        return {"text": f"{greeting} {question}", "process": os.getpid()}

    return answer


def refuse() -> Answer:
    """Fails to prepare."""
    os._exit(1)


def wait(seconds: str) -> Answer:
    """Takes long to prepare."""
    time.sleep(float(seconds))
    return prepare("slow")
