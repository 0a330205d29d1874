"""The command: from its start to SIGTERM, and every mistake one message before a model is loaded or a port is bound."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import tiny
from terminal import INTERRUPT, on_a_terminal

from blockwright.blocks.compose import compose
from blockwright.command import run
from blockwright.plugins.serve import __main__ as command
from blockwright.plugins.serve import serving
from blockwright.plugins.serve.served import Served
from blockwright.plugins.serve.server import Server
from blockwright.registry import extras
from blockwright.registry.command import run_command
from blockwright.training.data.tokenizers.bytes import Bytes

pytestmark = pytest.mark.xdist_group("serve_command")  # its folder and its process serve several tests


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a run's folder."""

    def make(model: dict[str, Any] | None = None, chat: str | None = "plain") -> Path:
        folder = tmp_path_factory.mktemp("run") / "tiny"
        decoder = compose(model, seed=3) if model else tiny()
        parts: dict[str, Any] = {
            "state_dict": {f"decoder.{k}": v for k, v in decoder.state_dict().items()},
            "hyper_parameters": {"model": decoder.config},
            "configuration": {"data": {"chat": chat}},
            "TextDataModule": {"tokenizer": Bytes().to_json()},
        }
        (folder / "checkpoints").mkdir(parents=True)
        torch.save(parts, folder / "checkpoints" / "last.ckpt")
        return folder

    return make


@pytest.fixture(scope="module")
def folder(save: Callable[..., Path]) -> Path:
    return save()


@pytest.fixture(scope="module")
def process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The command at work, with a key."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("secret\n")
    words = f"{folder} --port 0 --rows 2 --api-key-file {key} --grace 20 --bits 8 --device cpu".split()
    with subprocess.Popen(
        [sys.executable, "-m", "blockwright", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as made:
        yield made
        made.kill()


@pytest.mark.slow
def test_it_serves_from_its_start_until_sigterm_and_lets_a_request_end(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    start, caches, url = (process.stdout.readline() for _ in range(3))
    assert start == "tiny: 2 rows of 200 tokens, 256 texts may wait; chat format plain\n"
    assert re.fullmatch(r"caches: [\d.]+ KiB \(8 bits\)\n", caches)
    host = re.fullmatch(r"http://(127\.0\.0\.1:\d+)/v1\n", url)
    assert host is not None
    connection = http.client.HTTPConnection(host[1], timeout=60)
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 190, "ignore_eos": True, "stream": True})
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    connection.request("POST", "/v1/completions", body, headers)
    response = connection.getresponse()
    first = response.readline()
    process.send_signal(signal.SIGTERM)
    rest = response.read()
    assert first.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == ""
    assert re.fullmatch(r"\S+ \S+ request=\w+ route=/v1/completions status=200 prompt=5 new=190 .* ended=length\n", err)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host[1].partition(":")[0], int(host[1].partition(":")[2])))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_requests_at_once(folder: Path, environment: dict[str, str]) -> None:
    words = f"serve {folder} --port 0 --rows 2 --grace 60 --device cpu".split()
    with on_a_terminal(words, environment) as terminal:
        terminal.until(r"/v1\r\n")
        host = re.search(r"http://(127\.0\.0\.1:\d+)/v1", terminal.shown)
        assert host is not None
        connection = http.client.HTTPConnection(host[1], timeout=60)
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 190, "ignore_eos": True, "stream": True, "n": 64}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        terminal.type(INTERRUPT)
        time.sleep(1)  # two that come within one step of the model are heard as one
        terminal.type(INTERRUPT)
        with contextlib.suppress(http.client.IncompleteRead):
            assert b"[DONE]" not in response.read()
        assert terminal.end() == 130
        assert terminal.settings == terminal.before and "Traceback" not in terminal.shown


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """The servers that were started: none runs."""
    servers: list[Server] = []
    monkeypatch.setattr(Server, "run_until_signal", lambda self, listening: servers.append(self))
    monkeypatch.setattr(serving, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(serving, "set_float32_matmul", lambda *choice: None)
    monkeypatch.setattr(serving.logging, "basicConfig", lambda **options: None)
    return servers


def batch_of(servers: list[Server]) -> Any:
    (server,) = servers
    server.engine.close()
    return server.engine.batch


def test_memory_gives_as_many_rows_as_fit(folder: Path, started: list[Server]) -> None:
    assert run_command(run, ["serve", str(folder), "--memory", "1000000", "--port", "0", "--room", "64"]) == 0
    batch = batch_of(started)
    row = batch.nbytes // (batch.rows + 1)
    assert batch.room == 64 and 1_000_000 - row < batch.nbytes <= 1_000_000


def test_memory_counts_the_caches_of_drafts(
    folder: Path, started: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["serve", str(folder), "--memory", "1000000", "--port", "0", "--room", "64"]
    assert run_command(run, [*line, "--drafts", str(folder), "--draft-tokens", "2"]) == 0
    batch = batch_of(started)
    row = batch.nbytes // (batch.rows + 1)
    assert batch.drafted_at_most == 2 and 1_000_000 - row < batch.nbytes <= 1_000_000
    assert f"drafts: {folder}, at most 2 a pass" in capsys.readouterr().out


def test_a_room_is_that_of_the_model_or_less(folder: Path, started: list[Server]) -> None:
    assert run_command(run, ["serve", str(folder), "--port", "0"]) == 0
    batch = batch_of(started)
    assert (batch.rows, batch.room) == (8, 200)


def test_a_name_and_a_beginning_can_be_chosen(
    folder: Path, started: list[Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Served] = []
    application = serving.application
    monkeypatch.setattr(
        serving, "application", lambda e, served, *others: made.append(served) or application(e, served, *others)
    )
    assert run_command(run, ["serve", str(folder), "--port", "0", "--name", "mine", "--bos"]) == 0
    batch_of(started)
    assert made[0].name == "mine" and made[0].encode("a", "prompt") == [256, 97]
    assert capsys.readouterr().out.startswith("mine: ")


@pytest.mark.parametrize(("key", "warns"), [(None, True), ("k", False)])
def test_an_open_address_without_a_key_is_warned_of(
    folder: Path,
    started: list[Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str | None,
    warns: bool,
) -> None:
    if key:
        monkeypatch.setenv(command.KEY, key)
    assert run_command(run, ["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 0
    batch_of(started)
    assert capsys.readouterr().err.startswith("warning: ") == warns


OTHER_MODELS = {
    "its rows depend on each other": {
        "ffn": {"name": "moe", "n_experts": 4},
        "gating": {"name": "expert_choice", "top_k": 2},
        "experts": {"name": "swiglu", "d_ff": 16},
    },
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_model_whose_requests_would_change_each_other_is_refused(
    name: str, save: Callable[..., Path], started: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    other = save({**tiny().config, **OTHER_MODELS[name]})
    assert run_command(run, ["serve", str(other), "--port", "0"]) == 64
    error = capsys.readouterr().err
    assert error.startswith("error: MODEL = ") and error.count("\n") == 3 and "gating" in error and not started


MISTAKES = {
    "nowhere": "MODEL",
    "RUN --rows 0": "--rows",
    "RUN --rows many": "command line",
    "RUN --rows 2 --memory 100": "--memory",
    "RUN --memory 0": "--memory",
    "FOLDER --memory 100": "--memory",
    "FOLDER --rows 1000000000": "--rows",
    "FOLDER --rows 10000000000000000000000": "--rows",
    "FOLDER --memory 99999999999999999999999": "--memory",
    "RUN --room 1": "--room",
    "FOLDER --drafts mtp": "--drafts",
    "FOLDER --drafts nowhere": "--drafts",
    "FOLDER --drafts SMALL": "--drafts",
    "FOLDER --drafts lookup --draft-tokens 0": "--draft-tokens",
    "FOLDER --drafts lookup --draft-tokens 65": "--draft-tokens",
    "RUN --draft-tokens 2": "--draft-tokens",
    "RUN --name NEWLINE": "--name",
    "RUN --name EMPTY": "--name",
    "RUN --queue -1": "--queue",
    "RUN --bits 5": "command line",
    "RUN --port 70000": "--port",
    "RUN --port -1": "--port",
    "RUN --port USED": "--port",
    "RUN --host nowhere.invalid": "--host",
    "RUN --allow-host http://a": "--allow-host",
    "RUN --host 192.0.2.1": "--port",
    "RUN --grace -1": "--grace",
    "RUN --grace nan": "--grace",
    "RUN --grace 1e9": "--grace",
    "RUN --api-key secret": "command line",
    "RUN --api-key-file missing": "--api-key-file",
    "RUN --api-key-file EMPTY": "--api-key-file",
    "RUN --api-key-file TWO": "--api-key-file",
    "FOLDER --dtype float8": "dtype",
    "FOLDER --device abacus": "device",
    "FOLDER --chat none": "--chat",
    "FOLDER --chat chatml": "--chat",
    "": "command line",
    "RUN more": "command line",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_bound(
    line: str,
    folder: Path,
    save: Callable[..., Path],
    tmp_path: Path,
    started: list[Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "SMALL" in line:  # positions for fewer tokens
        Path("SMALL").symlink_to(save({**tiny(room=100).config, "position": {"name": "learned"}}))
    Path("EMPTY").write_text("\n")
    Path("TWO").write_text("a b")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        words = line.replace("FOLDER", str(folder)).replace("USED", str(used.getsockname()[1])).split()
        if "--name" in words:
            words[-1] = {"NEWLINE": "a\nb", "EMPTY": ""}[words[-1]]
        assert run_command(run, ["serve", *words, *([] if "--port" in line else ["--port", "0"])]) == 64
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {MISTAKES[line]} = ") and said.err.count("\n") == 3 and "  remedy: " in said.err
    assert said.out == "" and not started


def test_two_keys_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(command.KEY, "a")
    (tmp_path / "key").write_text("b")
    assert run_command(run, ["serve", "RUN", "--api-key-file", str(tmp_path / "key")]) == 64
    assert capsys.readouterr().err.startswith("error: --api-key-file = ")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(extras, "has_package", lambda name: name != "uvicorn")
    assert run_command(run, ["serve", "RUN"]) == 64
    assert "pip install 'blockwright[serve]'" in capsys.readouterr().err
