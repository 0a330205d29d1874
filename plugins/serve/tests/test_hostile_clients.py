"""Clients that hang up, die, read slowly, or send without end: nothing of them is left, nothing of others is lost."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from running import Echo, Running, alone, head, real, running

from blockwright.blocks.generation.job import Job
from blockwright.plugins.serve import answer, body, serving
from blockwright.plugins.serve.body import RefusedError
from blockwright.plugins.serve.engine import AHEAD, Engine, Listener, News

Start = Callable[..., Running]
LONG = {"prompt": "a" * 300, "max_tokens": 390}


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_ends_the_work(echo: Start, stream: bool) -> None:
    server = echo(pause=0.01, room=700)
    connection = server.send({**LONG, "stream": stream})
    server.until(lambda: server.engine.running == 1)
    connection.close()
    server.idle()
    assert server.batch.steps < 150  # of 300
    server.until(lambda: server.statuses() == {499: 1})


def test_a_hang_up_in_the_queue_ends_the_wait(echo: Start) -> None:
    server = echo(rows=1, room=700)
    server.batch.open.clear()
    waiting = [server.send({**LONG, "stream": i % 2 == 0}) for i in range(6)]
    server.until(lambda: server.engine.waiting == 6)
    for connection in waiting[1:]:
        connection.close()
    server.until(lambda: server.statuses().get(499) == 5)
    server.batch.open.set()
    server.idle()
    server.until(lambda: server.statuses().get(200) == 1)
    assert b'"text":"a' in waiting[0].recv(10_000)
    waiting[0].close()


def test_a_hang_up_within_a_body_leaves_nothing(echo: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = echo()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head("Content-Length: 99") + b'{"model"')
        time.sleep(0.05)
    server.until(lambda: server.statuses() == {499: 1})
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_what_a_slow_reader_leaves_unread_is_bounded(echo: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "UNREAD", 100)
    server = echo(room=8000, buffer=4096)
    asked = {"prompt": "abcdefgh" * 500, "max_tokens": 4000, "stream": True}
    with server.send(asked) as slow:
        begun = slow.recv(100)
        server.idle()  # the job has ended, and its client has read nothing yet
        assert begun.startswith(b"HTTP/1.1 200") and server.batch.steps < 3500
        rest = b""
        while b"slow_reader" not in rest and (part := slow.recv(65536)):
            rest += part
        assert b"slow_reader" in rest and b"[DONE]" not in rest
    assert len(server.stream(**asked)) > 100  # one that reads gets all of it


@pytest.mark.slow
def test_a_reader_that_stalls_is_cut(echo: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STALLED", 0.3)
    server = echo(rows=64, room=8000, several=50, buffer=4096)
    for stream in (True, False):
        with server.send({"prompt": "abcdefgh" * 500, "max_tokens": 4000, "n": 60, "stream": stream}) as stalled:
            stalled.recv(100)
            server.until(lambda: not server.server.server_state.connections)
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.settimeout(20)
        assert silent.recv(1) == b""  # closed: it has sent nothing


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_head_that_comes_in_drops_is_given_up(echo: Start, monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    monkeypatch.setattr(serving, "STALLED", 0.5)
    server = echo()
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(first)
        end = time.monotonic() + 10
        try:
            while time.monotonic() < end:
                slow.sendall(b"A")
                time.sleep(0.05)
        except OSError:  # closed
            pass
        assert time.monotonic() < end - 5
    server.until(lambda: not server.server.server_state.connections)


def test_a_long_answer_outlasts_the_time_of_a_head(echo: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STALLED", 0.2)
    server = echo(pause=0.02)
    for stream in (True, False):
        asked = {"model": "tiny", "prompt": "a" * 40, "max_tokens": 40, "stream": stream}
        assert server.ask("/v1/completions", asked)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_outlast_the_grace_end_with_an_error(echo: Start, stream: bool) -> None:
    server = echo(pause=0.02, room=700, grace=0.2)
    connection = server.send({**LONG, "stream": stream})
    server.until(lambda: server.engine.running == 1)
    server.server.should_exit = True
    text = b""
    while part := connection.recv(65536):
        text += part
    assert text.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert b"shutting_down" in text and b"[DONE]" not in text
    server.until(lambda: not server.batch.busy)
    connection.close()


@pytest.mark.parametrize("length", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_a_body_of_a_gigabyte_is_refused_while_it_comes(echo: Start, length: str) -> None:
    server = echo()
    sent, zeros = 0, b"\0" * 2**20
    chunk = b"%x\r\n%s\r\n" % (len(zeros), zeros) if "chunked" in length else zeros
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(length))
        try:
            while sent < 10**9:
                connection.sendall(chunk)
                sent += len(zeros)
        except OSError:  # reset: the server has closed it
            pass
    assert sent < 4 * body.DROPPED
    server.until(lambda: server.statuses() == {413: 1})


def test_a_body_too_long_or_without_end_gets_its_answer(echo: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = echo()
    status, error = server.ask("/v1/completions", {"model": "tiny", "prompt": "a" * 2 * body.LEAST})
    assert status == 413 and error["error"]["code"] == "request_too_large"
    monkeypatch.setattr(body, "SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head("Content-Length: 99") + b"{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


async def ask(port: int, asked: dict[str, Any], hang_up: int | None) -> str | None:
    """The text of a streamed completion; None of a client that hangs up after so many bytes of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({"model": "tiny", "stream": True, **asked}).encode()
    writer.write(head("Connection: close", f"Content-Length: {len(data)}") + data)
    if hang_up is not None:
        if hang_up:
            await reader.read(hang_up)
        writer.transport.abort()
        return None
    whole = (await reader.read()).decode()
    writer.close()
    assert whole.startswith("HTTP/1.1 200") and "data: [DONE]" in whole
    events = [json.loads(line[6:]) for line in whole.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize(("rows", "requests"), [(4, 24), pytest.param(16, 300, marks=pytest.mark.slow)])
def test_clients_at_once_of_which_a_third_hang_up(rows: int, requests: int) -> None:
    """Before the answer, at its beginning, or within it: the others get the text that they get alone."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    bodies = [
        {"prompt": "p" * (i % 13 + 1), "max_tokens": 5 + i % 17, "seed": i % 20, "temperature": (0, 0.8)[i % 2]}
        for i in range(requests)
    ]
    draw, batch = random.Random(0), real(rows)
    hang_ups = [draw.choice((0, 1, 300, 2000)) if i % 3 == 0 else None for i in range(requests)]

    async def many(port: int) -> list[str | None]:
        return await asyncio.gather(*(ask(port, *each) for each in zip(bodies, hang_ups, strict=True)))

    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        with running(batch, batch.decoder, queue=300) as server:
            texts = asyncio.run(many(server.port))
            server.idle()
            server.until(lambda: not server.server.server_state.connections)
            server.until(lambda: sum(server.statuses().values()) == requests)
            assert set(server.statuses()) <= {200, 499} and texts.count(None) == -(-requests // 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    known: dict[Any, str] = {}
    for asked, text in zip(bodies, texts, strict=True):
        given = (asked["prompt"], asked["max_tokens"], asked["seed"], asked["temperature"])
        if text is not None and given not in known:
            known[given] = alone(batch.decoder, *given)
        assert text is None or text == known[given]


def test_what_is_too_much_is_counted_before_it_is_looked_at(echo: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen, threads = echo(), list[int](), list[str]()
    conforms, parse = body.conforms, body.parse_json

    def noted(value: Any, hint: Any) -> bool:
        seen.append(len(value) if isinstance(value, list) else 0)
        return conforms(value, hint)

    def parsed(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return parse(*given)

    monkeypatch.setattr(body, "conforms", noted)
    monkeypatch.setattr(body, "parse_json", parsed)
    talks = [[{"role": "user", "content": "a"}] * 20_000]
    talks.append([{"role": "user", "content": [{"type": "text", "text": ""}] * 9_000}])
    prompts: list[Any] = [[65] * 50_000, [[65]] * 50_000, [[65] * 50_000], ["a"] * 50_000]
    for asked in (
        *({"prompt": prompt} for prompt in prompts),
        {"prompt": "a", "stop": ["a"] * 50_000},
        *({"messages": talk} for talk in talks),
    ):
        seen.clear(), threads.clear()
        path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
        status, answer = server.ask(path, {"model": "tiny", **asked})
        assert status == 400 and answer["error"]["param"] and max(seen) <= server.served.room
        assert len(seen) <= server.served.room and threads and server._thread.name not in threads


def test_a_step_of_many_drafts_is_no_slow_reader(echo: Start) -> None:
    choices = echo(rows=32, several=65, room=400).stream(prompt="a" * 150, max_tokens=150, n=32)
    assert sum(len(choice["text"]) for choice in choices) == 32 * 150


# ---- the thread that decodes, and the loop that asks it --------------------------------------------------------------


async def read(engine: Engine, jobs: list[Job], unread: int | None = None) -> list[News]:
    async with asyncio.timeout(30):
        with engine.run(jobs, unread) as listener:
            return [news async for some in listener for news in some]


def test_the_thread_waits_for_a_loop_that_is_behind() -> None:
    engine = Engine(batch := Echo(), 10)

    async def busy() -> list[News]:
        with engine.run([Job([1] * 150)]) as listener:
            time.sleep(0.2)  # the loop does something else
            assert batch.steps <= AHEAD + 1
            return [news async for some in listener for news in some]

    assert len(asyncio.run(busy())) == 151
    engine.close()


def test_a_listener_that_reads_too_slowly_loses_its_jobs_and_no_other_does() -> None:
    engine = Engine(batch := Echo(), 10)

    async def both() -> None:
        with engine.run([Job([1] * 150)], 20) as slow:
            assert len(await read(engine, [Job([2] * 150)])) == 151
            with pytest.raises(RefusedError, match="slow_reader"):
                await anext(aiter(slow))
            assert engine.waiting == engine.running == 0

    asyncio.run(both())
    engine.close()
    assert not batch.busy


def test_tokens_before_a_failure_are_read_before_it() -> None:
    async def late() -> list[News]:
        listener = Listener([job := Job([1])], None)
        listener.hear((job, 7, None))
        listener.fail(RefusedError(500, "The model has diverged", code="not_finite"))
        listener.hear((job, 8, None))
        found = []
        with pytest.raises(RefusedError, match="not_finite"):
            async for some in listener:
                found += some
        return found

    assert [token for _, token, _ in asyncio.run(late())] == [7]


def test_closing_ends_a_thread_at_work() -> None:
    engine = Engine(batch := Echo(pause=0.001), 10)

    async def leave() -> AsyncIterator[None]:
        with engine.run([Job([1] * 150)]):
            await asyncio.sleep(0.02)

    asyncio.run(leave())
    engine.close()
    assert batch.steps < 150
