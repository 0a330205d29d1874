"""Serve the page on this machine until SIGTERM or Ctrl-C."""

from __future__ import annotations

import secrets
import webbrowser
from contextlib import closing
from pathlib import Path

import uvicorn

from blockwright.lab.listening import PLAIN, listen, until_signal
from blockwright.plugins.studio.app import application
from blockwright.plugins.studio.composing import composer, warm_up
from blockwright.plugins.studio.guard import Guard

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
