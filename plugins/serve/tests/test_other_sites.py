"""Requests of pages of other sites, which a browser sends for them."""

from __future__ import annotations

import pytest
from running import Running

ASKED = {"model": "tiny", "prompt": "ab", "max_tokens": 2}


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/completions"])
def test_a_page_of_another_site_is_answered_nothing(server: Running, path: str) -> None:
    own, body = f"127.0.0.1:{server.port}", ASKED if path == "/v1/completions" else None
    rebound = {"Host": f"evil.example:{server.port}", "Origin": f"http://evil.example:{server.port}"}
    for headers in (rebound, {"Host": own, "Origin": "http://127.0.0.1:1"}, {"Host": own, "Origin": "null"}):
        status, answer = server.ask(path, body, **headers)
        assert status == 403 and answer["error"]["code"] == "other_site"


def test_its_own_page_and_programs_are_answered(server: Running) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        site = f"{host}:{server.port}"
        assert server.ask("/v1/completions", ASKED, Host=site, Origin=f"http://{site}")[0] == 200
    assert server.ask("/v1/completions", ASKED)[0] == 200
    assert server.ask("/v1/completions", ASKED, Host="a:80", Origin="https://a")[0] == 200  # an allowed host
