"""Routes: files of the page, limits on requests, late answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import pytest
import yaml
from starlette.testclient import TestClient

from blockwright.plugins.studio.app import PAGE

Visit = Callable[..., TestClient]


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


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"{" * 100_000, 400),
        (b'{"preset": "tiny"}', 400),
        (b'{"preset": 3, "changes": {}}', 400),
        (b'{"preset": "tiny", "changes": {"d_model": 3}}', 400),
        (b'{"preset": "tiny", "changes": [["d_model", "3"]]}', 400),
        (b'{"preset": "tiny", "changes": {"a": "' + b"x" * 300_000 + b'"}}', 413),
    ],
    ids=str,
)
def test_a_body_that_is_none_is_refused(visit: Visit, body: bytes, status: int) -> None:
    answer = visit().post("/draw", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]


def test_a_form_of_another_page_is_no_request(visit: Visit) -> None:
    """Pages of others can send a form or a text without asking the browser, but not JSON that is declared so."""
    body = b'{"preset": "tiny", "changes": {}}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert visit().post("/draw", content=body, headers={"content-type": kind}).status_code == 415


def test_a_late_answer_is_an_error_that_says_so(visit: Visit) -> None:
    answer = visit().post("/draw", json={"preset": "late", "changes": {}})
    assert answer.status_code == 504 and "took longer" in answer.json()["error"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST", "OPTIONS"])
def test_nothing_can_be_written(visit: Visit, method: str) -> None:
    for path in ("/", "/runs", "/run/x", "/report/x/index.html", "/page/main.js"):
        assert visit().request(method, path).status_code == 405
