"""The routes of the page: its files, questions about a choice, runs and reports."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blockwright.lab.report.svg import CSS
from blockwright.plugins.studio.runs import Index, Place, Runs
from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json
from blockwright.training.answering import AnswerError, Answering

# --- read the JSON object of a request: limited in bytes, time, depth and number of values ----------------------------


SECONDS = 10.0  # for a body to arrive
MOST = 200_000  # bytes


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        HTTPException: it is too long, too slow, no JSON, or no object
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "The body must be JSON, and declared so")
    data = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > MOST:
                    raise HTTPException(413, f"The body is longer than {MOST:,} bytes")
        values = parse_json(data.decode(), "body")
    except TimeoutError:
        raise HTTPException(408, f"The body has not arrived within {SECONDS:g} seconds") from None
    except (UnicodeDecodeError, ConfigError):
        raise HTTPException(400, "The body is not JSON") from None
    if not isinstance(values, dict):
        raise HTTPException(400, "The body must be a JSON object")
    return values


PAGE = Path(__file__).parent / "page"
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
OF_A_REPORT = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox allow-same-origin allow-popups"
)  # no script
LONGEST = 400  # characters of a name of a run, or of a part of one


def application(composing: Answering, logs: Path) -> Starlette:
    """The ASGI application, which any request reaches: studio/serving.py decides which may.

    Args:
        composing: answers questions about choices
        logs: the log folder
    """
    routes = Routes(composing, Runs(Index(logs)))
    app = Starlette(
        routes=[
            Route("/", functools.partial(_file, "index.html")),
            *(Route(f"/page/{name}", functools.partial(_file, name)) for name in _files()),
            Route("/forms", routes.forms),
            Route("/draw", routes.question, methods=["POST"]),
            Route("/copy", routes.question, methods=["POST"]),
            Route("/runs", routes.list),
            Route("/run/{name:path}", routes.run),
            Route("/report/{name:path}/{file}", routes.report),
        ],
        exception_handlers={HTTPException: _wrong, AnswerError: _late},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False  # to an address that the client names
    return app


class Routes:
    """The routes that answer with data.

    Args:
        composing, runs: as their classes say
    """

    def __init__(self, composing: Answering, runs: Runs) -> None:
        self.composing, self.runs = composing, runs

    async def forms(self, request: Request) -> Response:
        """What the forms are made of."""
        return JSONResponse(await run_in_threadpool(self.composing.ask, {"what": "forms"}))

    async def question(self, request: Request) -> Response:
        """A question about a choice; the last part of the path says which."""
        asked = await read_object(request)
        preset, changes = asked.get("preset"), asked.get("changes")
        if not isinstance(preset, str) or not isinstance(changes, dict):
            raise HTTPException(400, "The body must have preset, a text, and changes, texts by their path")
        if not all(isinstance(text, str) for text in changes.values()):
            raise HTTPException(400, "Each of changes must be a text, as on the command line")
        question = {"what": request.url.path.strip("/"), "preset": preset[:LONGEST], "changes": changes}
        return JSONResponse(await run_in_threadpool(self.composing.ask, question))

    async def list(self, request: Request) -> Response:
        """A page of the runs."""
        number = request.query_params.get("page", "0")
        if not number.isdecimal() or len(number) > 6:
            raise HTTPException(400, "page must be a number")
        part = request.query_params.get("part", "")[:LONGEST]
        return JSONResponse(await run_in_threadpool(self.runs.page, part, int(number)))

    async def run(self, request: Request) -> Response:
        """A run or a sweep."""
        place = await self._place(request)
        return JSONResponse(await run_in_threadpool(self.runs.one, place))

    async def report(self, request: Request) -> Response:
        """A file of a report; no script in it runs, and it reaches nothing."""
        place = await self._place(request)
        answer = await run_in_threadpool(self.runs.report, place, request.path_params["file"])
        if answer is None:
            raise HTTPException(404, "There is no such file of a report")
        return Response(answer[0], media_type=answer[1], headers={"content-security-policy": OF_A_REPORT})

    async def _place(self, request: Request) -> Place:
        name = request.path_params["name"]
        place = await run_in_threadpool(self.runs.index.find, name) if len(name) <= LONGEST else None
        if place is None:
            raise HTTPException(404, "There is no such run below the log folder")
        return place


@functools.cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Name → contents and media type of each file of the page, and of the style of charts."""
    files = [file for file in sorted(PAGE.rglob("*")) if file.suffix in MEDIA]
    made = {file.relative_to(PAGE).as_posix(): (file.read_bytes(), MEDIA[file.suffix]) for file in files}
    return {**made, "chart.css": (CSS.read_bytes(), "text/css")}


async def _file(name: str, request: Request) -> Response:
    data, media = _files()[name]
    return Response(data, media_type=media)


async def _wrong(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _late(request: Request, error: AnswerError) -> Response:
    return JSONResponse({"error": f"No answer of the process that composes: {error}"}, 504)
