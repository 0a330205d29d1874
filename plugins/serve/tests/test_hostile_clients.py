"""Clients that hang up, die, read slowly, or send without end: nothing of them is left, nothing of others is lost."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import load
import pytest
from running import Running, alone, real, running

from blockwright.plugins.serve import answer, body, fields
from blockwright.plugins.serve import body as reading
from blockwright.plugins.serve import server as serving

LONG = {"model": "tiny", "prompt": "a" * 300, "max_tokens": 390}


def statuses(server: Running, route: str = "/v1/completions") -> dict[int, int]:
    """Status → requests, of the metrics."""
    _, text = server.ask("/metrics")
    found = re.findall(rf'requests_total{{route="{route}",status="(\d+)"}} (\d+)', text)
    return {int(status): int(count) for status, count in found}


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_ends_the_work(echo: Callable[..., Running], stream: bool) -> None:
    server = echo(pause=0.01, room=700)
    connection = server.send("/v1/completions", {**LONG, "stream": stream})
    server.until(lambda: server.engine.running == 1)
    connection.close()
    server.idle()
    assert server.batch.steps < 150  # of 300
    server.until(lambda: sum(statuses(server).values()) == 1)
    assert statuses(server) == {499: 1}


def test_a_hang_up_in_the_queue_ends_the_wait(echo: Callable[..., Running]) -> None:
    server = echo(rows=1, room=700)
    server.batch.open.clear()
    waiting = [server.send("/v1/completions", {**LONG, "stream": i % 2 == 0}) for i in range(6)]
    server.until(lambda: server.engine.waiting == 6)
    for connection in waiting[1:]:
        connection.close()
    server.until(lambda: statuses(server).get(499) == 5)
    server.batch.open.set()
    server.idle()
    server.until(lambda: statuses(server).get(200) == 1)
    assert b'"text":"a' in waiting[0].recv(10_000)
    waiting[0].close()


def test_a_hang_up_within_a_body_leaves_nothing(echo: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    server = echo()
    connection = server.send("/health", {})
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    connection.sendall(head + b'{"model"')
    time.sleep(0.05)
    connection.close()
    server.until(lambda: statuses(server) == {499: 1})
    assert "Traceback" not in caplog.text


DIES = """
import json, socket, sys
for i in range(8):
    s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    data = json.dumps({"model": "tiny", "prompt": "a" * 300, "max_tokens": 390, "stream": i % 2 == 0}).encode()
    s.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: a\\r\\nContent-Type: application/json\\r\\n"
              b"Content-Length: %d\\r\\n\\r\\n" % len(data) + data)
    globals()[f"kept{i}"] = s
print("sent", flush=True)
s.recv(2**20)
import time; time.sleep(60)
"""


def test_clients_that_are_killed_leave_nothing(echo: Callable[..., Running]) -> None:
    server = echo(rows=4, pause=0.02, room=700)
    with subprocess.Popen([sys.executable, "-c", DIES, str(server.port)], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"sent\n"
        server.until(lambda: server.engine.running == 4 and server.engine.waiting == 4)
        client.send_signal(signal.SIGKILL)
    server.idle()
    assert server.batch.steps < 200
    server.until(lambda: statuses(server) == {499: 8})


@pytest.mark.slow
def test_what_a_slow_reader_leaves_unread_is_bounded(
    echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "UNREAD", 100)
    server = echo(room=8000, buffer=4096)
    asked = {"model": "tiny", "prompt": "abcdefgh" * 500, "max_tokens": 4000, "stream": True}
    with server.send("/v1/completions", asked) as slow:
        begun = slow.recv(100)
        server.idle()  # the job has ended, and its client has read nothing yet
        assert begun.startswith(b"HTTP/1.1 200") and server.batch.steps < 3500
        rest = b""
        while part := slow.recv(65536):
            rest += part
            if b"slow_reader" in rest:
                break
        assert b"slow_reader" in rest and b"[DONE]" not in rest
    pieces = server.ask("/v1/completions", asked)[1]  # one that reads gets all of it
    assert "slow_reader" not in pieces and pieces.endswith("data: [DONE]\n\n")


@pytest.mark.slow
def test_a_reader_that_stalls_is_cut(echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STALLED", 0.3)
    server = echo(rows=64, room=8000, several=50, buffer=4096)
    asked = {"model": "tiny", "prompt": "abcdefgh" * 500, "max_tokens": 4000, "n": 60}
    for stream in (True, False):
        with server.send("/v1/completions", {**asked, "stream": stream}) as stalled:
            stalled.recv(100)
            server.until(lambda: not server.server.server_state.connections)
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.settimeout(20)
        assert silent.recv(1) == b""  # closed: it has sent nothing


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_head_that_comes_in_drops_is_given_up(
    echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
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


def test_a_long_answer_outlasts_the_time_of_a_head(
    echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STALLED", 0.2)
    server = echo(pause=0.02)
    asked = {"model": "tiny", "prompt": "a" * 40, "max_tokens": 40}
    for stream in (True, False):
        assert server.ask("/v1/completions", {**asked, "stream": stream})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_outlast_the_grace_end_with_an_error(echo: Callable[..., Running], stream: bool) -> None:
    server = echo(pause=0.02, room=700, grace=0.2)
    connection = server.send("/v1/completions", {**LONG, "stream": stream})
    server.until(lambda: server.engine.running == 1)
    server.server.should_exit = True
    text = b""
    while part := connection.recv(65536):
        text += part
    assert text.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert b"shutting_down" in text and b"[DONE]" not in text
    server.until(lambda: not server.batch.busy)
    connection.close()


@pytest.mark.parametrize("head", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_a_body_of_a_gigabyte_is_refused_while_it_comes(echo: Callable[..., Running], head: str) -> None:
    server = echo()
    sent, zeros = 0, b"\0" * 2**20
    chunk = b"%x\r\n%s\r\n" % (len(zeros), zeros) if "chunked" in head else zeros
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{head}\r\n\r\n".encode()
        )
        try:
            while sent < 10**9:
                connection.sendall(chunk)
                sent += len(zeros)
        except OSError:  # reset: the server has closed it
            pass
    assert sent < 4 * body.DROPPED
    server.until(lambda: statuses(server) == {413: 1})


def test_a_body_a_little_too_long_gets_its_answer(echo: Callable[..., Running]) -> None:
    server = echo()
    asked = json.dumps({"model": "tiny", "prompt": "a" * 2 * body.LEAST}).encode()
    status, error = server.ask("/v1/completions", asked)
    assert status == 413 and error["error"]["code"] == "request_too_large"


def test_a_body_that_never_ends_is_given_up(echo: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "SECONDS", 0.2)
    server = echo()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b"{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def check_load(rows: int, requests: int, queue: int) -> float:
    """Clients at once, a third of which hang up: the others get the text that they get alone. Returns the p99."""
    bodies = [
        {"prompt": "p" * (i % 13 + 1), "max_tokens": 5 + i % 17, "seed": i % 20, "temperature": (0, 0.8)[i % 2]}
        for i in range(requests)
    ]
    batch = real(rows)
    with running(batch, batch.decoder, queue=queue) as server:
        outcomes = load.run(server.port, bodies)
        server.idle()
        server.until(lambda: not server.server.server_state.connections)
        known: dict[str, str] = {}
        for body, outcome in zip(bodies, outcomes, strict=True):
            name = json.dumps(body)
            if outcome.text is not None and name not in known:
                known[name] = alone(
                    server.decoder, body["prompt"], body["max_tokens"], body["seed"], body["temperature"]
                )
            assert outcome.text is None or (outcome.status, outcome.text) == (200, known[name])
        hung_up = sum(outcome.text is None for outcome in outcomes)
        server.until(lambda: sum(statuses(server).values()) == requests)
        assert hung_up == -(-requests // 3) and set(statuses(server)) <= {200, 499}
    return load.percentile(outcomes, 0.99)


def test_clients_at_once_of_which_a_third_hang_up() -> None:
    check_load(rows=4, requests=24, queue=256)


@pytest.mark.slow
def test_three_hundred_clients_at_once_of_which_a_third_hang_up(capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        p99 = check_load(rows=16, requests=300, queue=300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with capsys.disabled():
        print(f"\n300 clients at once on 16 rows: p99 of a whole answer {p99:.1f} s")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [65] * 50_000}),
        ("/v1/completions", {"prompt": [[65]] * 50_000}),
        ("/v1/completions", {"prompt": [[65] * 50_000]}),
        ("/v1/completions", {"prompt": ["a"] * 50_000}),
        ("/v1/completions", {"prompt": "a", "stop": ["a"] * 50_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 20_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 9_000}]}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_too_much_is_counted_before_it_is_looked_at(
    echo: Callable[..., Running], path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, seen, threads = echo(), list[int](), list[str]()
    conforms, parse = fields.conforms, reading.parse_json

    def noted(value: Any, hint: Any) -> bool:
        seen.append(len(value) if isinstance(value, list) else 0)
        return conforms(value, hint)

    def parsed(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return parse(*given)

    monkeypatch.setattr(fields, "conforms", noted)
    monkeypatch.setattr(reading, "parse_json", parsed)
    status, answer = server.ask(path, {"model": "tiny", **body})
    assert status == 400 and answer["error"]["param"] and max(seen) <= server.served.room
    assert len(seen) <= server.served.room and threads and server._thread.name not in threads


def test_a_step_of_many_drafts_is_no_slow_reader(echo: Callable[..., Running]) -> None:
    server = echo(rows=32, several=65, room=400)
    body = {"model": "tiny", "prompt": "a" * 150, "max_tokens": 150, "n": 32, "stream": True}
    status, text = server.ask("/v1/completions", body)
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    assert sum(len(event["choices"][0]["text"]) for event in events) == 32 * 150
