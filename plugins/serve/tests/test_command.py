"""The command: from its start to SIGTERM, and every mistake one message before a port is bound."""

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
from collections.abc import Callable
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
from blockwright.plugins.serve.serving import Server
from blockwright.registry import errors
from blockwright.registry.command import run_command
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("serve_command")  # its folder and its process serve several tests


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a run's folder."""

    def make(model: dict[str, Any] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("run") / "tiny"
        decoder = compose(model, seed=3) if model else tiny()
        parts: dict[str, Any] = {"state_dict": {f"decoder.{k}": v for k, v in decoder.state_dict().items()}}
        parts |= {"hyper_parameters": {"model": decoder.config}, "configuration": {"data": {"chat": "plain"}}}
        parts["TextDataModule"] = {"tokenizer": Bytes().to_json()}
        (folder / "checkpoints").mkdir(parents=True)
        torch.save(parts, folder / "checkpoints" / "last.ckpt")
        return folder

    return make


@pytest.fixture(scope="module")
def folder(save: Callable[..., Path]) -> Path:
    return save()


@pytest.mark.slow
def test_it_serves_from_its_start_until_sigterm_and_lets_a_request_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    options = f"--port 0 --rows 2 --api-key-file {tmp_path / 'key'} --grace 20 --bits 8 --device cpu".split()
    command = [sys.executable, "-m", "blockwright", "serve", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    *_, url = (process.stdout.readline() for _ in range(3))
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
    assert "status=200 prompt=5 new=190" in err
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
    monkeypatch.setattr(serving, "multiply_fastest", lambda *models: None)
    monkeypatch.setattr(serving.logging, "basicConfig", lambda **options: None)
    return servers


def batch_of(servers: list[Server]) -> Any:
    (server,) = servers
    server.engine.close()
    return server.engine.batch


@pytest.mark.parametrize("drafts", [False, True])
def test_memory_gives_as_many_rows_as_fit_with_the_caches_of_drafts(
    folder: Path, started: list[Server], drafts: bool
) -> None:
    line = ["serve", str(folder), "--memory", "1000000", "--port", "0", "--room", "64"]
    line += ["--drafts", str(folder), "--draft-tokens", "2"] if drafts else []
    assert run_command(run, line) == 0
    batch = batch_of(started)
    row = batch.nbytes // (batch.rows + 1)
    assert batch.room == 64 and 1_000_000 - row < batch.nbytes <= 1_000_000 and batch.drafted_at_most == 2 * drafts


def test_a_name_and_a_beginning_can_be_chosen_and_the_room_is_that_of_the_model(
    folder: Path, started: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Served] = []
    application = serving.application
    monkeypatch.setattr(
        serving, "application", lambda e, served, *others: made.append(served) or application(e, served, *others)
    )
    assert run_command(run, ["serve", str(folder), "--port", "0", "--name", "mine", "--bos"]) == 0
    batch = batch_of(started)
    assert (batch.rows, batch.room) == (8, 200)
    assert made[0].name == "mine" and made[0].encode("a", "prompt") == [256, 97]


@pytest.mark.parametrize("key", [None, "k"])
def test_an_open_address_without_a_key_is_warned_of(
    folder: Path, started: list[Server], monkeypatch: pytest.MonkeyPatch, capsys: Any, key: str | None
) -> None:
    if key:
        monkeypatch.setenv(command.KEY, key)
    assert run_command(run, ["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 0
    batch_of(started)
    assert capsys.readouterr().err.startswith("warning: ") == (key is None)


MISTAKES = """
MODEL: nowhere|DEPENDING
--rows: RUN --rows 0|FOLDER --rows 1000000000|FOLDER --rows 10000000000000000000000
--memory: RUN --rows 2 --memory 100|RUN --memory 0|FOLDER --memory 100|FOLDER --memory 99999999999999999999999
--room: RUN --room 1
--drafts: FOLDER --drafts mtp|FOLDER --drafts nowhere|FOLDER --drafts SMALL
--draft-tokens: FOLDER --drafts lookup --draft-tokens 0|FOLDER --drafts lookup --draft-tokens 65|RUN --draft-tokens 2
--name: RUN --name NEWLINE|RUN --name EMPTY
--queue: RUN --queue -1
--port: RUN --port 70000|RUN --port -1|RUN --port USED|RUN --host 192.0.2.1
--host: RUN --host nowhere.invalid
--allow-host: RUN --allow-host http://a
--grace: RUN --grace -1|RUN --grace nan|RUN --grace 1e9
--api-key-file: RUN --api-key-file missing|RUN --api-key-file EMPTY|RUN --api-key-file TWO|KEY RUN --api-key-file ONE
dtype: FOLDER --dtype float8
device: FOLDER --device abacus
--chat: FOLDER --chat none|FOLDER --chat chatml
command line: RUN --rows many|RUN --bits 5|RUN --api-key secret|RUN more|
"""


def test_a_mistake_is_one_message_and_nothing_is_bound(
    folder: Path, save: Callable[..., Path], tmp_path: Path, started: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """SMALL has positions for fewer tokens; rows of DEPENDING depend on each other."""
    monkeypatch.chdir(tmp_path)
    Path("SMALL").symlink_to(save({**tiny(room=100).config, "position": {"name": "learned"}}))
    of_experts = {"ffn": {"name": "moe", "n_experts": 4}, "experts": {"name": "swiglu", "d_ff": 16}}
    dependent = save({**tiny().config, **of_experts, "gating": {"name": "expert_choice", "top_k": 2}})
    Path("DEPENDING").symlink_to(dependent)
    for name, text in (("EMPTY", "\n"), ("TWO", "a b"), ("ONE", "b")):
        Path(name).write_text(text)
    wrong = []
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        for path, lines in (row.split(": ", 1) for row in MISTAKES.strip().splitlines()):
            for line in lines.split("|"):
                words = line.replace("FOLDER", str(folder)).replace("USED", str(used.getsockname()[1])).split()
                if "--name" in words:
                    words[-1] = {"NEWLINE": "a\nb", "EMPTY": ""}[words[-1]]
                with monkeypatch.context() as patch:
                    if words[:1] == ["KEY"]:  # two keys
                        patch.setenv(command.KEY, words.pop(0))
                    code = run_command(run, ["serve", *words, *([] if "--port" in line else ["--port", "0"])])
                said = capsys.readouterr()
                right = code == 64 and said.err.startswith(f"error: {path} = ") and "  remedy: " in said.err
                wrong += [] if right and said.err.count("\n") == 3 and not said.out else [(line, said)]
    assert wrong == [] and not started


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(errors, "has_package", lambda name: name != "uvicorn")
    assert run_command(run, ["serve", "RUN"]) == 64
    assert "blockwright[serve]" in capsys.readouterr().err
