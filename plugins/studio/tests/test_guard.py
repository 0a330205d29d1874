"""Attacks on the page: without its token, by another name, from another origin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bench import HOST, PORT, TOKEN
from starlette.testclient import TestClient

Visit = Callable[..., TestClient]
PATHS = ("/", "/forms", "/runs", "/run/x", "/report/x/index.html", "/page/main.js", "/nothing")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "", "another", TOKEN[:-1], TOKEN + "x", "é"])
def test_nothing_is_answered_without_the_token(visit: Visit, path: str, token: str | None) -> None:
    answer = visit(None).get(path, params={} if token is None else {"token": token})
    assert answer.status_code == 401 and "set-cookie" not in answer.headers and TOKEN not in answer.text


def test_the_token_is_needed_once_and_no_script_can_read_it(visit: Visit) -> None:
    client = visit(None)
    first = client.get("/", params={"token": TOKEN})
    assert first.status_code == 200 and "<script" in first.text
    cookie = first.headers["set-cookie"]
    assert f"studio-{PORT}={TOKEN}" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert client.get("/forms").status_code == 200


def test_a_token_in_the_address_opens_the_page_alone(visit: Visit) -> None:
    assert visit(None).get("/forms", params={"token": TOKEN}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}", f"{HOST}.evil.example", ""]
)
def test_another_host_is_refused(visit: Visit, host: str) -> None:
    for path in PATHS:
        assert visit().get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", f"https://{HOST}", f"http://127.0.0.1:{PORT + 1}"])
def test_another_origin_is_refused(visit: Visit, origin: str) -> None:
    body = {"preset": "tiny", "changes": {}}
    assert visit().post("/draw", json=body, headers={"origin": origin}).status_code == 403
    assert visit().get("/", params={"token": TOKEN}, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_of_another_site_asks_for_is_refused(visit: Visit, site: str) -> None:
    for path in PATHS[1:]:
        assert visit().get(path, headers={"sec-fetch-site": site}).status_code == 403
    assert visit().get("/", headers={"sec-fetch-site": site}).status_code == 200  # a link to the page shows it


def test_its_own_requests_pass(visit: Visit) -> None:
    headers = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    answer = visit().post("/draw", json={"preset": "tiny", "changes": {}}, headers=headers)
    assert answer.json()["asked"] == {"what": "draw", "preset": "tiny", "changes": {}}


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_forbids_scripts_of_others_and_frames(visit: Visit, path: str) -> None:
    for client in (visit(), visit(None)):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "script-src" not in policy or "script-src 'self';" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_the_page_has_no_script_and_no_address_but_its_own(visit: Visit) -> None:
    page = visit().get("/").text
    assert '<script type="module" src="page/main.js"></script>' in page and page.count("<script") == 1
    assert "http" not in page and "onclick" not in page
