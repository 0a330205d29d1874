"""The answer to a request: whole, or streamed as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from blockwright.plugins.serve.body import RefusedError, until_gone
from blockwright.plugins.serve.engine import Engine, Listener
from blockwright.plugins.serve.observing import Account
from blockwright.plugins.serve.protocol import Choice, Json, Order, Piece, Protocol
from blockwright.plugins.serve.served import Served

UNREAD = 1024  # tokens made that a client of a stream has not read
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass
class Answer:
    """Both kinds.

    Args:
        engine: runs the jobs
        served: the model
        protocol: that the request was written in
        order: its texts
        account: of the request
    """

    engine: Engine
    served: Served
    protocol: Protocol
    order: Order
    account: Account
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        wanted = self.order.likeliest is not None
        self.choices = {job: Choice(job, self.served.decode, self.order.stops, wanted) for job in self.order.jobs}
        self.account.prompt = self.order.prompt_tokens

    def head(self, kind: str) -> Json:
        """What an answer and each piece of it begin with."""
        return {
            "id": f"{self.protocol.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.served.name,
        }

    def usage(self) -> Json:
        """Tokens read and made."""
        prompt, new = self.order.prompt_tokens, sum(choice.count for choice in self.choices.values())
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def choice(self, index: int, part: Json, piece: Piece) -> Json:
        """A choice; see ``Protocol.choice``."""
        return self.protocol.choice(index, part, piece, self.order.likeliest is not None)

    async def pieces(self, listener: Listener) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of the choices as they come, each with the number of its choice."""
        async for news in listener:
            for job, token, why in news:
                choice = self.choices[job]
                choice.hear(token, why)
                if choice.why is not None:
                    self.engine.cancel(job)  # where a stop string has ended it
            self.account.new = sum(choice.count for choice in self.choices.values())
            self.account.note_first()
            for i, choice in enumerate(self.choices.values()):
                if (piece := choice.take()) is not None:
                    yield i, piece
            if all(choice.why for choice in self.choices.values()):
                self.account.ended = ",".join(sorted({str(choice.why) for choice in self.choices.values()}))
                return


class Whole(Answer):
    """One JSON document, when all texts have ended."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        document = await until_gone(receive, self._document())
        await JSONResponse(document)(scope, receive, send)

    async def _document(self) -> Json:
        texts = [Piece() for _ in self.choices]
        with self.engine.run(self.order.jobs) as listener:
            async with aclosing(self.pieces(listener)) as pieces:
                async for i, piece in pieces:
                    texts[i].text += piece.text
                    texts[i].tokens += piece.tokens
                    texts[i].why = piece.why
        choices = [self.choice(i, self.protocol.text(text.text), text) for i, text in enumerate(texts)]
        return {**self.head(self.protocol.kind), "choices": choices, "usage": self.usage()}


class Streamed(Answer):
    """Pieces of the texts as they come."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_gone(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        with self.engine.run(self.order.jobs, UNREAD) as listener:
            async with aclosing(self._events(listener)) as events:
                first = await anext(events)  # an error has a status of its own until the answer begins
                headers = [(name.encode(), value.encode()) for name, value in EVENTS.items()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await _send(send, first)
                try:
                    async for event in events:
                        await _send(send, event)
                    await _send(send, b"data: [DONE]\n\n")
                except RefusedError as error:
                    self.account.ended = error.code or "refused"
                    await _send(send, _event(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, listener: Listener) -> AsyncGenerator[bytes, None]:
        head = self.head(self.protocol.chunk_kind) | ({"usage": None} if self.order.usage else {})
        begun: set[int] = set()
        async with aclosing(self.pieces(listener)) as pieces:
            async for i, piece in pieces:
                for choice in self._parts(i, piece, i not in begun):
                    yield _event({**head, "choices": [choice]})
                begun.add(i)
        if self.order.usage:
            yield _event({**head, "choices": [], "usage": self.usage()})

    def _parts(self, index: int, piece: Piece, first: bool) -> list[Json]:
        """A piece as choices of chunks: what opens the text, what is new of it, and why it has ended."""
        parts = [self.choice(index, part, Piece()) for part in self.protocol.opening()] if first else []
        if piece.text or piece.tokens:
            parts.append(self.choice(index, self.protocol.delta(piece.text), Piece(tokens=piece.tokens)))
        if piece.why:
            parts.append(self.choice(index, self.protocol.delta(""), Piece(why=piece.why)))
        return parts


def _event(document: Json) -> bytes:
    text: Any = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
