"""A line of the log and the metrics of each request. Neither has any of its text."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockwright.plugins.serve.metrics import Metrics
from blockwright.plugins.serve.waiting import GoneError

HUNG_UP = 499  # nginx's status of a request whose client is gone
LOG = logging.getLogger("blockwright.serve")


@dataclass
class Account:
    """What a request has cost.

    Args:
        prompt, new: tokens
        first: seconds to the first new token; None before
        ended: why its texts ended
    """

    start: float = field(default_factory=time.monotonic)
    prompt: int = 0
    new: int = 0
    first: float | None = None
    ended: str = "-"

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.start

    def note_first(self) -> None:
        """Take the time of the first token."""
        if self.first is None:
            self.first = self.seconds


class Observed:
    """An application whose requests are logged and counted.

    Args:
        app: the application; finds the request's ``account`` in its state
        metrics: are added to
        routes: that metrics and log name; any other path is ``other``, since clients choose paths
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        account, name = Account(), uuid.uuid4().hex
        scope.setdefault("state", {})["account"] = account
        route = scope["path"] if scope["path"] in self.routes else "other"
        status = HUNG_UP

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except GoneError:
            status, account.ended = HUNG_UP, "hung_up"
        except asyncio.CancelledError:  # the server ends, and does not wait for this client any longer
            account.ended = "cut"
        finally:
            self._record(route, status, name, account)

    def _record(self, route: str, status: int, name: str, account: Account) -> None:
        self.metrics.requests[route, status] += 1
        self.metrics.prompt_tokens += account.prompt
        self.metrics.new_tokens += account.new
        if account.first is not None:
            self.metrics.first_token.add(account.first)
            self.metrics.request.add(account.seconds)
        first = "-" if account.first is None else f"{account.first:.3f}"
        LOG.log(
            logging.INFO if route.startswith("/v1/") or status >= 400 else logging.DEBUG,  # others only look
            "request=%s route=%s status=%d prompt=%d new=%d first=%s seconds=%.3f ended=%s",
            *(name, route, status, account.prompt, account.new, first, account.seconds, account.ended),
        )
