"""A page of another server in the user's browser, which sends the user's cookie with what it asks of this one."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("studio_page")]
ATTACK = """<body><script>
const studio = %r, done = []
const attempt = (what, options) => fetch(studio + what, { credentials: "include", ...options })
  .then(r => r.text().then(t => done.push([what, r.type, t.length])), e => done.push([what, "blocked", 0]))
Promise.all([
  attempt("/forms"), attempt("/runs"), attempt("/"),
  attempt("/runs", { mode: "no-cors" }), attempt("/forms", { mode: "no-cors" }),
  attempt("/draw", { method: "POST", mode: "no-cors", body: '{"preset": "tiny", "changes": {}}' }),
  attempt("/draw", { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" }),
]).then(() => { document.title = JSON.stringify(done) })
</script><iframe src="%s/"></iframe><script src="%s/page/main.js" type="module"></script></body>"""


@contextmanager
def serving(text: str) -> Iterator[int]:
    """Another server on this machine, whose page has a text."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_page_of_another_server_reads_nothing_even_with_the_users_cookie(browser: Any, address: str) -> None:
    studio = address.partition("/?")[0]
    with serving(ATTACK % (studio, studio, studio)) as port:
        context = browser.new_context()
        own = context.new_page()
        own.goto(address)
        own.wait_for_selector("header")
        assert context.cookies()
        other = context.new_page()
        statuses: dict[str, set[int]] = {}
        other.on("response", lambda r: statuses.setdefault(r.url.removeprefix(studio), set()).add(r.status))
        other.goto(f"http://127.0.0.1:{port}/")
        other.wait_for_selector("html:has(title)", state="attached")
        while not other.title():
            other.wait_for_timeout(100)
        found = other.evaluate("JSON.parse(document.title)")
        assert len(found) == 7 and all(kind in ("blocked", "opaque") and not length for _, kind, length in found), found
        for path in ("/forms", "/runs", "/draw", "/page/main.js"):
            assert statuses.get(path, {403}) <= {403}, statuses
        assert not other.frames[1].query_selector("header") if len(other.frames) > 1 else True
        context.close()
