"""The application: its routes, and how errors are answered."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from blockwright.lab.listening import Site
from blockwright.plugins.serve.answer import Streamed, Whole
from blockwright.plugins.serve.body import Fields, RefusedError, most_bytes, read_object, shown, until_gone
from blockwright.plugins.serve.chat import Chat, Completions
from blockwright.plugins.serve.engine import Engine
from blockwright.plugins.serve.observing import CONTENT_TYPE, Metrics, Observed
from blockwright.plugins.serve.protocol import Json, Protocol
from blockwright.plugins.serve.served import Served

PROTOCOLS: tuple[Protocol, ...] = (Completions(), Chat())
PAGE = Path(__file__).parent / "page.html"
POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
WITHOUT_KEY = ("/", "/health")  # they show nothing of the model


def application(engine: Engine, served: Served, site: Site, key: str | None = None) -> ASGIApp:
    """The ASGI application.

    Args:
        engine: runs the jobs
        served: the model
        site: whose requests are answered
        key: that requests must show; None for none
    """
    routes = Routes(engine, served)
    app: ASGIApp = routes.app()
    return Observed(Own(app if key is None else Keyed(app, key), site), routes.metrics, routes.paths)


class Own:
    """An application that no page of another site reaches through a browser.

    Args:
        app: the application
        site: tells them apart
    """

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self.app, self.site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if rule := self.site.foreign(headers, scope["path"]):
            error = RefusedError(403, f"{rule}. A name of your own is allowed by --allow-host NAME", code="other_site")
            await JSONResponse(error.body, 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Keyed:
    """An application that only requests with a key reach.

    Args:
        app: the application
        key: expected as ``Authorization: Bearer KEY``
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._expected = app, _digest(b"Bearer " + key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] in WITHOUT_KEY or hmac.compare_digest(_digest(header), self._expected):
            await self.app(scope, receive, send)
            return
        error = RefusedError(401, "Send the key of this server: Authorization: Bearer KEY", code="invalid_api_key")
        await JSONResponse(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)


class Routes:
    """The routes of the application."""

    def __init__(self, engine: Engine, served: Served) -> None:
        self.engine, self.served, self.metrics = engine, served, Metrics()
        self.paths = {"/", "/health", "/metrics", "/v1/models", *(protocol.path for protocol in PROTOCOLS)}

    def app(self) -> Starlette:
        """The application without key, log and metrics."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            *(Route(protocol.path, self._answering(protocol), methods=["POST"]) for protocol in PROTOCOLS),
        ]
        handlers = {RefusedError: self._refusal, HTTPException: _missing, Exception: _failure}
        app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
        app.router.redirect_slashes = False  # to an address that the client names
        return app

    async def page(self, request: Request) -> Response:
        """A page to try the model."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": POLICY})

    async def health(self, request: Request) -> Response:
        """200, or 503 once decoding has failed."""
        return PlainTextResponse("ok\n" if self.engine.failed is None else "failed\n", self._status)

    @property
    def _status(self) -> int:
        return 200 if self.engine.failed is None else 503

    async def show_metrics(self, request: Request) -> Response:
        """What Prometheus reads."""
        batch = self.engine.batch
        state = {
            "jobs_running": ("gauge", "Texts that have tokens", self.engine.running),
            "jobs_waiting": ("gauge", "Texts that have none yet", self.engine.waiting),
            "rows": ("gauge", "Texts that can be computed at once", batch.rows),
            "cache_bytes": ("gauge", "Memory of all caches", batch.nbytes),
            "steps_total": ("counter", "Steps of the batch", batch.steps),
            "drafted_tokens_total": ("counter", "Tokens that were drafted", batch.acceptance.drafted),
            "accepted_tokens_total": ("counter", "Drafts that were the tokens drawn", batch.acceptance.accepted),
        }
        return PlainTextResponse(self.metrics.text(state), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """A model by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> Json:
        served = self.served
        about = {"id": served.name, "object": "model", "created": served.created, "owned_by": "blockwright"}
        return {**about, "max_model_len": served.room}

    def _check_name(self, name: str) -> None:
        if name != self.served.name:
            rule = f"The model {shown(name)} does not exist. This server has {self.served.name}"
            raise RefusedError(404, rule, "model", "model_not_found")

    def _answering(self, protocol: Protocol) -> Callable[[Request], Awaitable[ASGIApp]]:
        async def answer(request: Request) -> ASGIApp:
            fields = Fields(await read_object(request, most_bytes(self.served.room) + self.served.file_bytes))
            self._check_name(fields.need("model", str))
            order = await until_gone(request.receive, protocol.read(fields, self.served))
            kind = Streamed if order.stream else Whole
            return kind(self.engine, self.served, protocol, order, request.state.account)

        return answer

    async def _refusal(self, request: Request, error: RefusedError) -> Response:
        headers = {}
        if error.status == 429:
            headers["retry-after"] = str(self._seconds_to_a_row())
        if error.status in (408, 413):  # the rest of the body is not read
            headers["connection"] = "close"
        return JSONResponse(error.body, error.status, headers)

    def _seconds_to_a_row(self) -> int:
        """Until a row is free, on average: as many requests as rows end in the time of one."""
        return max(1, math.ceil(self.metrics.request.mean / self.engine.batch.rows))


async def _missing(request: Request, error: HTTPException) -> Response:
    rule = f"{request.method} {shown(request.url.path)} is not served"
    body = RefusedError(error.status_code, rule, code="unknown_url").body
    return JSONResponse(body, error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(RefusedError(500, "The server has failed", code="server_failed").body, 500)


def _digest(data: bytes) -> bytes:
    """Of equal length for any key, so that a comparison takes equal time."""
    return hashlib.sha256(data).digest()
