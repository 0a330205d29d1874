"""Starts of a process of templates in tests; that process imports them by name."""

from __future__ import annotations

import os
import time

from blockwright.training.answering import Answer


def slowly(seconds: str) -> Answer:
    """Takes long to prepare, and renders the same for every template."""
    time.sleep(float(seconds))
    return lambda question: {"text": "hello"}


def never() -> Answer:
    """Fails to prepare."""
    os._exit(1)
