"""The command: from its start to SIGTERM, and every mistake one message before a port is bound."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockwright.command import run
from blockwright.plugins.studio.serving import composer
from blockwright.registry import errors
from blockwright.registry.command import run_command
from blockwright.training.answering import AnswerError


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "blockwright", "studio", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=tmp_path, text=True, **pipes) as made:  # type: ignore[call-overload]
        yield made
        made.kill()


def get(port: int, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


@pytest.mark.slow
def test_it_prints_its_address_serves_and_ends_with_sigterm(process: subprocess.Popen[str], tmp_path: Path) -> None:
    assert process.stdout is not None
    address, about = process.stdout.readline(), process.stdout.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/\?token=[\w-]{32})\n", address)
    assert found and str(tmp_path / "logs") in about
    port = int(found[1])
    opened = get(port, found[2])
    assert opened.status == 200 and b"<title>" in opened.read()
    cookie = opened.headers["set-cookie"].partition(";")[0]
    assert get(port, "/runs", cookie=cookie).status == 200
    assert get(port, "/runs").status == 401
    process.send_signal(signal.SIGTERM)
    said, complaints = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM) and not said and not complaints
    assert not (tmp_path / "logs").exists(), "it writes nothing"


MISTAKES = {"nothing": "LOGS", "file": "LOGS", "--port -1": "--port", "--port 70000": "--port"}
MISTAKES |= {"--port x": "command line", "--host 0.0.0.0": "command line", "--port {taken}": "--port"}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_message(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run_command(run, ["studio", *words.format(taken=taken.getsockname()[1]).split()]) == 64
    said = capsys.readouterr().err
    assert said.startswith(f"error: {MISTAKES[words]} = ") and said.count("error:") == 1


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "has_package", lambda name: name != "uvicorn")
    assert run_command(run, ["studio"]) == 64
    assert "blockwright[studio]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_question_that_takes_too_long_ends_and_the_next_is_answered() -> None:
    composing = composer()
    question = {"what": "draw", "preset": "tiny", "changes": {}}
    try:
        assert composing.ask(question)["picture"].startswith("<svg")
        composing.seconds = 0.01
        with pytest.raises(AnswerError, match="took longer"):
            composing.ask({**question, "preset": "deepseek_v4_flash"})
        composing.seconds = 60.0
        assert composing.ask(question)["picture"].startswith("<svg")
    finally:
        composing.close()
