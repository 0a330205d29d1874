from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench import HOST, PORT, TOKEN, Bench
from starlette.testclient import TestClient

from blockwright.plugins.studio.app import application
from blockwright.plugins.studio.guard import Guard


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def visit(logs: Path) -> Callable[..., TestClient]:
    """A browser of the page; by default with its token."""

    def open_it(token: str | None = TOKEN, **headers: str) -> TestClient:
        app = Guard(application(Bench(), logs), TOKEN, PORT)  # type: ignore[arg-type]
        client = TestClient(app, base_url=f"http://{HOST}", headers=headers, raise_server_exceptions=False)
        if token is not None:
            client.get("/", params={"token": token})
        return client

    return open_it
