"""A line of the log and the metrics of each request. Neither has any of its text."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockwright.plugins.serve.body import GoneError

# --- counters and histograms as Prometheus reads them (text format 0.0.4) ---------------------------------------------


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "blockwright_"


class Histogram:
    """How many values are at most each bound.

    Args:
        bounds: in order
    """

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    @property
    def mean(self) -> float:
        """Of the values; 0 for none."""
        return self._sum / max(1, sum(self._counts))

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, name: str) -> Iterator[str]:
        """The lines of its samples."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server has done since its start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # route and status
        self.prompt_tokens = self.new_tokens = 0
        self.first_token, self.request = Histogram(), Histogram()

    def text(self, state: Mapping[str, tuple[str, str, float]]) -> str:
        """All of it.

        Args:
            state: name → kind, help and value of what is measured now
        """
        lines = _head("requests_total", "counter", "HTTP requests by route and status; 499: the client hung up")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}requests_total{{route="{route}",status="{status}"}} {count}')
        totals = {
            "prompt_tokens_total": ("counter", "Tokens of prompts", self.prompt_tokens),
            "new_tokens_total": ("counter", "Tokens of answers", self.new_tokens),
        }
        for name, (kind, about, value) in {**totals, **state}.items():
            lines += [*_head(name, kind, about), f"{PREFIX}{name} {value}"]
        for name, about, histogram in (
            ("first_token_seconds", "From a request to its first token", self.first_token),
            ("request_seconds", "From a request to the end of its answer, of requests with tokens", self.request),
        ):
            lines += [*_head(name, "histogram", about), *histogram.samples(PREFIX + name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]


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
