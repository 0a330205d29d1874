"""Serve the page on this machine, to its browser alone, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import closing
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qsl

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockwright.lab.listening import PLAIN, Site, listen, until_signal
from blockwright.plugins.studio.app import application
from blockwright.training.answering import Answer, AnswerError, Answering

PAGE = "/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An application that only requests with the token reach.

    Args:
        app: the application
        token: of the address that the command prints
        port: that it is served at
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self._expected = app, _digest(token)
        self._site = Site(port)
        self._cookie = f"studio-{port}"
        self._set = f"{self._cookie}={token}; HttpOnly; SameSite=Strict; Path=/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # neither web sockets nor events of a life span
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if rule := self._site.foreign(headers, scope["path"], PAGE):
            await _refused(403, rule)(scope, receive, _with(send, HEADERS))
        elif scope["path"] == PAGE and self._is_token(_of_query(scope)):
            await self.app(scope, receive, _with(send, {**HEADERS, "set-cookie": self._set}))
        elif self._is_token(self._of_cookie(headers)):
            await self.app(scope, receive, _with(send, HEADERS))
        else:
            rule = "Open the address that blockwright studio has printed: its token is needed once"
            await _refused(401, rule)(scope, receive, _with(send, HEADERS))

    def _is_token(self, token: str) -> bool:
        return hmac.compare_digest(_digest(token), self._expected)

    def _of_cookie(self, headers: Mapping[str, str]) -> str:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return morsel.value if morsel else ""


def _of_query(scope: Scope) -> str:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token", "")


def _digest(token: str) -> bytes:
    """Of equal length for any token, so that a comparison takes equal time."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _refused(status: int, rule: str) -> ASGIApp:
    return PlainTextResponse(f"{rule}.\n", status)


def _with(send: Send, headers: Mapping[str, str]) -> Send:
    """Send with these headers, where an answer has none of the name."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name for name, _ in message["headers"]}
            further = [(name.encode(), value.encode()) for name, value in headers.items()]
            message = {**message, "headers": [*message["headers"], *(h for h in further if h[0] not in present)]}
        await send(message)

    return sending


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
