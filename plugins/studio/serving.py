"""Serve the page on this machine until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import secrets
import threading
import webbrowser
from contextlib import closing
from pathlib import Path

import uvicorn

from blockwright.lab.listening import PLAIN, listen, until_signal
from blockwright.plugins.studio.app import application
from blockwright.plugins.studio.guard import Guard
from blockwright.training.answering import Answer, AnswerError, Answering

# --- a process that composes, so that the server answers meanwhile, and that ends where it takes too long -------------


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


HOST = "127.0.0.1"


def serve(logs: Path, port: int, opened: bool) -> None:
    """Serve, and print the address.

    Args:
        logs: the log folder
        port: 0 for any that is free
        opened: whether to open the address in the user's browser

    Raises:
        ConfigError: the port is in use
    """
    listening = listen(HOST, port)
    port, token, composing = listening.getsockname()[1], secrets.token_urlsafe(24), composer()
    address = f"http://{HOST}:{port}/?token={token}"
    server = uvicorn.Server(settings(Guard(application(composing, logs), token, port)))
    with closing(composing), until_signal():
        warm_up(composing)
        print(f"{address}\nruns of {logs}; Ctrl-C ends it", flush=True)
        if opened:
            webbrowser.open(address)
        server.run([listening])


def settings(app: Guard) -> uvicorn.Config:
    """Of the server."""
    return uvicorn.Config(app, http="h11", timeout_graceful_shutdown=2, limit_concurrency=64, **PLAIN)
