"""A chat template is a program of its author: one that loops, allocates or dies fails its own request alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from running import Echo, Running, running, tiny

from blockwright.lab.writer import Writer
from blockwright.plugins.serve.served import chat_of
from blockwright.training.answering import Answering
from blockwright.training.data.chat import jinja
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("serve_templates")

TEMPLATE = """{% set said = messages[0].content %}
{%- if said == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif said == 'compiled' %}{{ (9 * messages | length) ** (9 ** 8) % 7 }}
{%- elif said == 'allocate' %}{{ 'a' * (messages | length * 10**11) }}
{%- elif said == 'write' %}{{ 'a' * (messages | length * 2**25 + 1) }}
{%- elif said == 'refuse' %}{{ raise_exception('not this') }}
{%- else %}{{ said }}{% endif %}"""
LIMIT = 0.4
GREEDY = 1.5 * 2**30  # bytes: more than a template may have


def words() -> Bytes:
    made = Bytes()
    made.companions = {"chat_template.jinja": TEMPLATE}
    return made


def slowly(seconds: str) -> Answering:
    """A process of templates that takes so long to start."""
    return Answering("starting:slowly", seconds, seconds=30.0, within=30.0, start=0.01, longest=1000)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja.PROCESS, "seconds", LIMIT)
        with running(Echo(pause=0.01, room=700), tiny()) as made:
            form = chat_of("nowhere", Writer(tiny(), words()), None)
            object.__setattr__(made.served, "chat", form)
            yield made


def chat(server: Running, text: str) -> tuple[int, Any]:
    talk = [{"role": "user", "content": text}]
    return server.ask("/v1/chat/completions", {"model": "tiny", "messages": talk})


def test_a_template_that_takes_too_much_fails_its_own_request(server: Running) -> None:
    for text in ("loop", "compiled", "allocate", "write", "refuse"):
        status, answer = chat(server, text)
        assert status == 400 and answer["error"]["param"] == "messages", text
        status, answer = chat(server, "né \ue000\ue001 日本")
        assert status == 200 and answer["choices"][0]["message"]["content"] == "né  日本"


@contextmanager
def looping(server: Running, n: int) -> Iterator[None]:
    """While templates loop, until their processes are killed: one is at work all along."""
    with ThreadPoolExecutor(n) as clients, pytest.MonkeyPatch.context() as patch:
        jinja.PROCESS.begin()
        patch.setattr(jinja.PROCESS, "seconds", 600.0)
        waiting = [clients.submit(chat, server, "loop") for _ in range(n)]
        time.sleep(0.2)
        yield
        assert not any(each.done() for each in waiting)
        patch.setattr(jinja.PROCESS, "seconds", LIMIT)
        assert jinja.PROCESS.pid is not None
        os.kill(jinja.PROCESS.pid, signal.SIGKILL)
        assert [each.result()[0] for each in waiting] == [400] * n


def test_streams_flow_and_decoding_allocates_while_a_template_loops(server: Running) -> None:
    with looping(server, 2):
        assert server.stream(prompt="abc" * 5, max_tokens=20)
        for _ in range(10):
            torch.empty(int(GREEDY), dtype=torch.uint8)
            time.sleep(0.01)


@pytest.mark.slow
def test_a_client_that_hangs_up_waits_for_no_template(server: Running) -> None:
    with ThreadPoolExecutor(1) as client:
        busy = client.submit(chat, server, "loop")
        time.sleep(0.2)
        at_work = server.server.server_state.tasks
        talk = {"messages": [{"role": "user", "content": "loop"}]}
        waiting = [server.send(talk, "/v1/chat/completions") for _ in range(20)]
        server.until(lambda: len(at_work) == 21)
        for connection in waiting:
            connection.close()
        server.until(lambda: len(at_work) <= 1)
        busy.result()
        start = time.monotonic()
        assert chat(server, "hi")[0] == 200 and time.monotonic() - start < 10 * LIMIT  # of 20


def test_a_process_that_is_killed_is_replaced(server: Running) -> None:
    assert chat(server, "hi")[0] == 200
    pid = jinja.PROCESS.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert chat(server, "hi")[0] == 400  # it may have been this template's doing
    assert chat(server, "hi")[0] == 200


def test_a_slow_start_is_not_the_clients_fault(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 until it has started, which no request begins again; 503 too where it cannot start."""
    monkeypatch.setattr(jinja, "PROCESS", slow := slowly("1.5"))
    answers = [chat(server, "hi") for _ in range(3)]
    assert [status for status, _ in answers] == [503] * 3
    assert answers[0][1]["error"]["type"] == "server_error"
    pid = slow.pid
    slow.begin()
    assert chat(server, "hi")[0] == 200 and slow.pid == pid is not None
    slow.close()
    broken = Answering("starting:never", seconds=30.0, within=30.0, start=30.0, longest=1000)
    monkeypatch.setattr(jinja, "PROCESS", broken)
    assert chat(server, "hi")[0] == 503
    monkeypatch.setattr(jinja, "PROCESS", slow := slowly("0.5"))  # making the format waits for its start
    form = chat_of("nowhere", Writer(tiny(), words()), None)
    assert form is not None and slow.pid is not None and form.render([{"role": "user", "content": "hi"}])
    slow.close()
