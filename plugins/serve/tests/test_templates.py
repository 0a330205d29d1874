"""A chat template is a program of its author: one that loops, allocates or dies fails its own request alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from running import Echo, Running, running, tiny

from blockwright.lab.writer import Writer
from blockwright.plugins.serve.served import chat_of
from blockwright.training.data.chat import template, template_process
from blockwright.training.data.chat.template_process import TemplateProcess
from blockwright.training.data.tokenizers.bytes import Bytes

pytestmark = pytest.mark.xdist_group("serve_templates")

TEMPLATE = """{% set said = messages[0].content %}
{%- if said == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif said == 'compiled' %}{{ (9 * messages | length) ** (9 ** 8) % 7 }}
{%- elif said == 'allocate' %}{{ 'a' * (messages | length * 10**11) }}
{%- elif said == 'write' %}{{ 'a' * (messages | length * 2**25 + 1) }}
{%- elif said == 'refuse' %}{{ raise_exception('not this') }}
{%- else %}{{ said }}{% endif %}"""
LIMIT = 1.0
GREEDY = 1.5 * 2**30  # bytes: more than a template may have


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "SECONDS", LIMIT)
        patch.setattr(template_process, "LATE", 0.5)
        words = Bytes()
        words.companions = {"chat_template.jinja": TEMPLATE}
        with running(Echo(pause=0.01, room=700), tiny()) as made:
            form = chat_of("nowhere", Writer(tiny(), words), None)
            object.__setattr__(made.served, "chat", form)
            yield made


def chat(server: Running, text: str) -> tuple[int, Any]:
    talk = [{"role": "user", "content": text}]
    return server.ask("/v1/chat/completions", {"model": "tiny", "messages": talk})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("loop", "longer"),
        ("compiled", "longer"),
        ("allocate", "Memory"),
        ("write", "characters"),
        ("refuse", "not this"),
    ],
)
def test_a_template_that_takes_too_much_fails_its_own_request(server: Running, text: str, why: str) -> None:
    status, answer = chat(server, text)
    assert status == 400 and answer["error"]["param"] == "messages" and why in answer["error"]["message"]
    status, answer = chat(server, "né \ue000\ue001 日本")
    assert status == 200 and answer["choices"][0]["message"]["content"] == "né  日本"


def test_streams_flow_and_others_are_answered_while_a_template_loops(server: Running) -> None:
    with ThreadPoolExecutor(12) as clients:
        looping = [clients.submit(chat, server, "loop") for _ in range(2)]
        time.sleep(0.2)
        start = time.monotonic()
        for _ in range(3):
            body = {"model": "tiny", "prompt": "abc" * 5, "max_tokens": 20, "stream": True}
            assert server.ask("/v1/completions", body)[0] == 200
        assert time.monotonic() - start < LIMIT and not any(each.done() for each in looping)
        assert [each.result()[0] for each in looping] == [400, 400]


def test_decoding_may_allocate_while_a_template_renders(server: Running) -> None:
    with ThreadPoolExecutor(1) as client:
        looping = client.submit(chat, server, "loop")
        time.sleep(0.3)
        for _ in range(20):
            torch.empty(int(GREEDY), dtype=torch.uint8)
            time.sleep(0.01)
        assert not looping.done() and looping.result()[0] == 400


def test_a_client_that_hangs_up_waits_for_no_template(server: Running) -> None:
    with ThreadPoolExecutor(1) as client:
        looping = client.submit(chat, server, "loop")
        time.sleep(0.2)
        at_work = server.server.server_state.tasks
        body = {"model": "tiny", "messages": [{"role": "user", "content": "loop"}]}
        waiting = [server.send("/v1/chat/completions", body) for _ in range(20)]
        server.until(lambda: len(at_work) == 21)
        for connection in waiting:
            connection.close()
        server.until(lambda: len(at_work) <= 1, 2 * LIMIT)
        looping.result()
        start = time.monotonic()
        assert chat(server, "hi")[0] == 200 and time.monotonic() - start < 5 * LIMIT  # of 20


@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced() -> None:
    made = TemplateProcess("{{ a }}")
    assert made.render({"a": "\ud800"}) == "\ud800"
    assert made.answering._process is not None
    made.answering._process.kill()
    made.answering._process.join()
    with pytest.raises(template.TemplateError):
        made.render({"a": 1})
    assert made.render({"a": 2}) == "2"
    made.answering.close()
