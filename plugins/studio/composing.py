"""A process that composes, so that the server answers meanwhile, and that ends where it takes too long."""

from __future__ import annotations

import contextlib
import threading

from blockwright.training.answering import Answer, AnswerError, Answering

SECONDS = 20.0  # of computing for an answer
WITHIN = 300.0  # seconds that pass meanwhile, on a machine that does other work
START = 120.0  # seconds that a question waits while the process imports what it needs
LONGEST = 64_000_000  # bytes of an answer


def composer() -> Answering:
    """Answers the requests of studio/answers.py."""
    return Answering(f"{__name__}:prepare", seconds=SECONDS, within=WITHIN, start=START, longest=LONGEST)


def warm_up(composer: Answering) -> None:
    """Start its process meanwhile, so that the first question need not wait for all of it."""

    def begin() -> None:
        with contextlib.suppress(AnswerError):  # the server has ended meanwhile
            composer.begin()

    threading.Thread(target=begin, daemon=True).start()


def prepare() -> Answer:
    """What answers, once the slow first answer is given."""
    import torch

    from blockwright.plugins.studio.answers import answer

    torch.set_num_threads(1)  # nothing is computed but shapes
    answer({"what": "draw", "preset": "deepseek_v2", "changes": {}})  # the first of a process is slow
    return answer
