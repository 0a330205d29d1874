"""The page as a client of this process sees it, and the command at work for a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import HOST, PORT, TOKEN, Bench
from starlette.testclient import TestClient

from blockwright.plugins.studio.app import application
from blockwright.plugins.studio.serving import Guard


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command runs: its logs are in logs/."""
    made = tmp_path_factory.mktemp("project")
    (made / "logs").mkdir()
    return made


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command at work."""
    words = [sys.executable, "-m", "blockwright", "studio", "logs", "--port", "0"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="session")
def address(server: subprocess.Popen[str]) -> str:
    """Of the server."""
    assert server.stdout is not None
    return server.stdout.readline().strip()


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
