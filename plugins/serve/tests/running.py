"""A server in a thread of the test's process, over a tiny model or over a batch whose texts are their prompts."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts import Drafter
from blockwright.blocks.generation.generate import Continuations, TextStream
from blockwright.blocks.generation.job import Job
from blockwright.blocks.generation.sample import Acceptance, Sampling
from blockwright.lab.chat.conversation import ChatText
from blockwright.lab.listening import Site, listen
from blockwright.lab.writer import Writer
from blockwright.plugins.serve.app import application
from blockwright.plugins.serve.engine import Engine
from blockwright.plugins.serve.served import Served
from blockwright.plugins.serve.serving import Server
from blockwright.registry import BlockError
from blockwright.training.data.tokenizers.tokenizer import Bytes

ROOM = 200


def tiny(room: int = ROOM) -> Decoder:
    """A model of bytes, random but sharp."""
    model = {"vocab_size": 257, "d_model": 32, "n_layers": 2, "max_positions": room, "norm": {"name": "rmsnorm"}}
    model |= {"init": {"std": 0.3, "depth_scaled": False}, "position": {"name": "rope"}, "residual": "prenorm"}
    model |= {"attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": {"name": "swiglu", "d_ff": 64}}
    return compose(model, seed=3).eval()


def alone(decoder: Decoder, prompt: str, n: int, seed: int = 0, temperature: float = 1.0) -> str:
    """The text that a request gives alone: the reference."""
    text = TextStream(Bytes().decode)
    rows = Continuations(decoder, [list(prompt.encode())], n, Sampling(temperature), seed=seed, stop_tokens={256})
    return "".join(text.push(token) for (token,) in rows if token is not None) + text.close()


def head(*more: str, path: str = "/v1/completions") -> bytes:
    """The head of a request, written by hand."""
    lines = (f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/json", *more, "", "")
    return "\r\n".join(lines).encode()


class Echo:
    """A batch whose texts are their prompts; ``pause``: seconds of a step; ``several``: tokens of a job in a step."""

    def __init__(self, rows: int = 4, room: int = ROOM, pause: float = 0.0, several: int = 1) -> None:
        self.rows, self.room, self.pause, self.several = rows, room, pause, several
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.steps, self.nbytes, self.drafted_at_most = 0, 1000, several - 1
        self.acceptance = Acceptance()
        self.open = threading.Event()  # steps wait while it is not set
        self.open.set()
        self.fault: Exception | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, job: Job) -> Job:
        if job.prompt[:1] == [0]:
            raise BlockError("prompt", 0, "begins with a zero", "Write another")
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        if job.ended is None:
            job.ended = "cancelled"
            (self.waiting if job in self.waiting else self.running).remove(job)

    def step(self) -> list[tuple[Job, int | None]]:
        self.open.wait()
        time.sleep(self.pause)
        if self.fault is not None:
            raise self.fault
        while self.waiting and len(self.running) < self.rows:
            self.running.append(self.waiting.popleft())
        self.steps += 1
        made = [pair for job in self.running for pair in self._tokens(job)]
        self.running = [job for job in self.running if job.ended is None]
        return made

    def _tokens(self, job: Job) -> Iterator[tuple[Job, int | None]]:
        for _ in range(self.several):
            if job.ended is None:
                at = len(job.tokens)
                if at == len(job.prompt):
                    job.ended = "end"
                    yield job, None
                    return
                job.tokens.append(job.prompt[at])
                job.ended = "length" if at + 1 == job.new_tokens else None
                yield job, job.prompt[at]


class Running:
    """A server at work. ``buffer``: bytes that the kernel keeps for a client that does not read."""

    def __init__(
        self, batch: Any, decoder: Decoder, queue: int = 256, key: str | None = None, buffer: int = 0, grace: float = 5
    ) -> None:
        words = Bytes()
        self.batch, self.decoder = batch, decoder
        self.engine = Engine(batch, queue)
        self.served = Served("tiny", Writer(decoder, words), batch.room, self.engine.places, ChatText("plain", words))
        self._listening = listen("127.0.0.1", 0)
        if buffer:
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.port = self._listening.getsockname()[1]
        site = Site(self.port, allowed=["a"])  # the host of the tests that write their requests by hand
        self.server = Server(application(self.engine, self.served, site, key), self.engine, grace)
        self._thread = threading.Thread(target=self.server.run, args=([self._listening],), daemon=True)
        self._thread.start()
        self.served.renderer.submit(int).result()  # its thread is the server's, not a test's
        self.until(lambda: self.server.started)

    @property
    def url(self) -> str:
        """Of the protocol."""
        return f"http://127.0.0.1:{self.port}/v1"

    @staticmethod
    def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it has not happened"
            time.sleep(0.005)

    def idle(self) -> None:
        """Wait until no job is left, in the engine and in the batch."""
        self.until(lambda: self.engine.running == self.engine.waiting == 0 and not self.batch.busy)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a POST, or of a GET without a body; bytes are sent as they are."""
        sent = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET" if body is None else "POST", path, data, sent)
            response = connection.getresponse()
            text = response.read().decode()
        kind = response.headers["content-type"] or ""
        return response.status, json.loads(text) if kind == "application/json" else text

    def stream(self, **body: Any) -> list[Any]:
        """The choices of a streamed completion that ends well, in order."""
        status, text = self.ask("/v1/completions", {"model": "tiny", "max_tokens": 100, "stream": True, **body})
        assert status == 200 and text.endswith("data: [DONE]\n\n")
        return [json.loads(event[6:])["choices"][0] for event in text.split("\n\n")[:-2]]

    def statuses(self) -> dict[int, int]:
        """Status → completions, of the metrics."""
        found = re.findall(r'requests_total{route="/v1/completions",status="(\d+)"} (\d+)', self.ask("/metrics")[1])
        return {int(status): int(count) for status, count in found}

    def send(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """A connection with a request sent, whose answer has not been read."""
        data = json.dumps({"model": "tiny", **body}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        connection.settimeout(60)
        connection.sendall(head(f"Content-Length: {len(data)}", path=path) + data)
        return connection

    def close(self) -> None:
        """End it as SIGTERM does."""
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.engine.close()
        self.served.renderer.shutdown()


@contextmanager
def running(batch: Any, decoder: Decoder, **options: Any) -> Iterator[Running]:
    """A server for a while; no job is left after it."""
    server = Running(batch, decoder, **options)
    try:
        yield server
        server.idle()
    finally:
        server.close()


def real(rows: int = 4, room: int = ROOM, drafts: Drafter | None = None) -> Batch:
    """A batch of the tiny model."""
    return Batch(tiny(room), rows, room, drafts=drafts)
