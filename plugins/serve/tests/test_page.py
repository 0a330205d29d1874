"""The page in a real browser: it asks, streams, stops, and shows errors and text as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import Running

pytestmark = pytest.mark.slow


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; it may complain of nothing but answers with an error."""
    complaints: list[str] = []

    def open_it(server: Running, key: str = "") -> Any:
        page = browser.new_page(viewport={"width": 320, "height": 800})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "status of" not in message.text else None)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.fill("[name=key]", key)
        return page

    yield open_it
    assert complaints == []


def shows(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('pre').textContent.includes(text)", arg=text, timeout=20_000)


def test_text_is_streamed_and_shown_as_text(echo: Callable[..., Running], open_page: Callable[..., Any]) -> None:
    page = open_page(echo(key="secret"), "secret")
    page.fill("[name=prompt]", "<b>né 🙂</b><script>alert(1)</script>")
    for chat in (False, True):
        page.set_checked("[name=chat]", chat)
        page.click("[name=send]")
        page.wait_for_selector("[name=send]:enabled")
        shows(page, "<b>né 🙂</b><script>alert(1)</script>")
    assert page.evaluate("document.querySelectorAll('pre *').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_refusal_is_shown(echo: Callable[..., Running], open_page: Callable[..., Any]) -> None:
    page = open_page(echo(key="secret"), "other")
    page.fill("[name=prompt]", "a")
    page.click("[name=send]")
    shows(page, "[Send the key of this server")
    assert page.is_enabled("[name=send]")


def test_stop_ends_the_work(echo: Callable[..., Running], open_page: Callable[..., Any]) -> None:
    server = echo(pause=0.05, room=700)
    page = open_page(server)
    page.fill("[name=prompt]", "a" * 300)
    page.fill("[name=tokens]", "300")
    page.click("[name=send]")
    shows(page, "aaa")
    page.click("[name=stop]")
    server.idle()
    assert server.batch.steps < 300 and page.is_enabled("[name=send]")
