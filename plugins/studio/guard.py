"""Who may use the page: this machine's browser that has the token of its address, and no page of another site.

Pages of other servers on this machine send its cookies too, so host and origin are checked (lab/listening.py). What
passes gets headers by which the browser runs no script but those of this package, sends the address to no other site,
and shows the page in no frame.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockwright.lab.listening import Site

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
