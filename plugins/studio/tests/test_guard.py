"""Routes and attacks on them: files, limits, tokens, other names and origins."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable

import yaml
from bench import HOST, PORT, TOKEN
from starlette.testclient import TestClient

from blockwright.plugins.studio.app import PAGE

Visit = Callable[..., TestClient]
PATHS = ("/", "/forms", "/runs", "/run/x", "/report/x/index.html", "/page/main.js", "/nothing")


def test_nothing_is_answered_without_the_token(visit: Visit) -> None:
    client = visit(None)
    for path, token in itertools.product(PATHS, (None, "", "another", TOKEN[:-1], TOKEN + "x", "é")):
        answer = client.get(path, params={} if token is None else {"token": token})
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


HOSTS = ("evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}", f"{HOST}.evil.example", "")
ORIGINS = ("http://evil.example", "null", f"https://{HOST}", f"http://127.0.0.1:{PORT + 1}")
SITES = ("cross-site", "same-site")


def test_another_host_origin_or_site_is_refused(visit: Visit) -> None:
    client = visit()
    for path, host in itertools.product(PATHS, HOSTS):
        assert client.get(path, headers={"host": host}).status_code == 403
    for origin in ORIGINS:
        body = {"preset": "tiny", "changes": {}}
        assert client.post("/draw", json=body, headers={"origin": origin}).status_code == 403
        assert client.get("/", params={"token": TOKEN}, headers={"origin": origin}).status_code == 403
    for path, site in itertools.product(PATHS, SITES):
        answer = client.get(path, headers={"sec-fetch-site": site})
        assert answer.status_code == (200 if path == "/" else 403)  # a link to the page shows it


def test_its_own_requests_pass(visit: Visit) -> None:
    headers = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    answer = visit().post("/draw", json={"preset": "tiny", "changes": {}}, headers=headers)
    assert answer.json()["asked"] == {"what": "draw", "preset": "tiny", "changes": {}}


def test_every_answer_forbids_scripts_of_others_and_frames(visit: Visit) -> None:
    for client, path in itertools.product((visit(), visit(None)), PATHS):
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


def test_every_file_of_the_page_is_served_and_nothing_else(visit: Visit) -> None:
    client = visit()
    types = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    for file in PAGE.rglob("*.*"):
        name = file.relative_to(PAGE).as_posix()
        answer = client.get(f"/page/{name}")
        if file.suffix in types and file.parent.name != "__pycache__":
            assert answer.content == file.read_bytes() and types[file.suffix] in answer.headers["content-type"]
        else:
            assert answer.status_code == 404
    for path in ("../__main__.py", "%2e%2e/__main__.py", "..%2f__main__.py", "vendor/manifest.yaml", "/etc/passwd"):
        assert client.get(f"/page/{path}").status_code == 404


def test_scripts_import_nothing_but_files_of_the_page() -> None:
    for file in PAGE.glob("*.js"):
        for name in re.findall(r'from "([^"]+)"', file.read_text()):
            assert (file.parent / name).is_file(), f"{file.name}: {name}"


def test_files_of_others_are_unchanged_and_have_their_licences() -> None:
    manifest = yaml.safe_load((PAGE / "vendor" / "manifest.yaml").read_text())
    assert {file.name for file in (PAGE / "vendor").glob("*.js")} == set(manifest)
    for name, about in manifest.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == about["sha256"]
        assert about["licences"] and all((PAGE / "vendor" / each).is_file() for each in about["licences"])


BODIES = [b"", b"[]", b"\xff", b"{" * 100_000, b'{"preset": "tiny"}', b'{"preset": 3, "changes": {}}']
BODIES += [b'{"preset": "tiny", "changes": {"d_model": 3}}', b'{"preset": "tiny", "changes": [["d_model", "3"]]}']
LONG = b'{"preset": "tiny", "changes": {"a": "' + b"x" * 300_000 + b'"}}'


def test_a_body_that_is_none_is_refused(visit: Visit) -> None:
    client = visit()
    for body in (*BODIES, LONG):
        answer = client.post("/draw", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == (413 if body == LONG else 400) and answer.json()["error"], body[:50]


def test_a_form_of_another_page_is_no_request(visit: Visit) -> None:
    """Pages of others can send a form or a text without asking the browser, but not JSON that is declared so."""
    body = b'{"preset": "tiny", "changes": {}}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert visit().post("/draw", content=body, headers={"content-type": kind}).status_code == 415


def test_a_late_answer_is_an_error_that_says_so(visit: Visit) -> None:
    answer = visit().post("/draw", json={"preset": "late", "changes": {}})
    assert answer.status_code == 504 and "took longer" in answer.json()["error"]


def test_nothing_can_be_written(visit: Visit) -> None:
    client = visit()
    for path in ("/", "/runs", "/run/x", "/report/x/index.html", "/page/main.js"):
        for method in ("PUT", "DELETE", "POST", "OPTIONS"):
            assert client.request(method, path).status_code == 405
