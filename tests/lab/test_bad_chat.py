"""What is wrong in a chat, or in a model to load, is one message: of the command line, the model, a line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_folder
import pytest
import torch

import blockwright
from blockwright.command import run
from blockwright.lab.chat import __main__ as command
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command
from blockwright.training.data.tokenizers.bytes import Bytes

pytestmark = pytest.mark.xdist_group("bad_chat")  # its fixture is slow to set up

LONG = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, good and bad, each in a folder of its name."""
    base = tmp_path_factory.mktemp("models")

    def save(name: str, template: str | None = chat_folder.TEMPLATE, trained: Any = None, **changes: Any) -> Path:
        return chat_folder.save(
            base / name, tiny, chat_folder.words(base / f"{name}.words", template), trained, **changes
        )

    save("good")
    save("learned", position="learned")
    save("no_format", None)
    chat_folder.save(base / "bytes", tiny, Bytes())
    save("no_template", "{% for %}")
    save(
        "no_system",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}",
    )
    save("endless", LONG)
    save("bomb", "{{ 'a' * 10**11 }}")
    save("unknown_format", trained="nope")
    save("gone", None, {"name": "jinja", "template": "/gone/template.jinja"})
    file = save("few_ids") / "checkpoints" / "last.ckpt"
    small = chat_folder.save(base / "small", tiny, None, None) / "checkpoints" / "last.ckpt"
    cut = torch.load(file, weights_only=True)
    cut["hyper_parameters"]["model"] = {**cut["hyper_parameters"]["model"], "vocab_size": 200}
    cut["state_dict"] = {k: v[:200] if "embedding" in k or "head" in k else v for k, v in cut["state_dict"].items()}
    torch.save(cut, file)
    small.write_bytes(small.read_bytes()[:1000])
    (base / "empty").mkdir()
    (base / "there.jsonl").write_text("kept")
    (base / "hf").mkdir()
    (base / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "of_none").mkdir()
    (base / "of_none" / "config.json").write_text(json.dumps({"model_type": "nope"}))
    (base / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    return base


OF_A_MODEL = {
    "nowhere": "no such file or folder",
    "empty": "holds neither",
    "small": "cannot be loaded safely",
    "hf": "model.safetensors",
    "of_none": "is not a known architecture",
    "no.gguf": "cannot be read as GGUF",
}
OF_A_CHAT = {
    "no_format": "has no chat format",
    "bytes --format chatml": "has no special token",
    "good --format nope": "nope",
    "no_template": "is no Jinja template",
    "no_system --system kind": "no system",
    "endless": "took longer than",
    "bomb": "Memory",
    "unknown_format": "nope",
    "gone": "names no file",
    "few_ids": "do not belong together",
    "learned --context 100000": "has positions for",
    "good --context 3": "at least 16",
    "good --context 1000000000000": "memory of cpu",
    "good --temperature -1": "temperature",
    "good --temperature nan": "temperature",
    "good --temperature 0 --top-k 3": "no effect",
    "good --max-new-tokens 0": "at least 1",
    "good --seed -1": "2^63",
    "good --sistem x": "unrecognized",
    "": "required",
}
OF_A_LINE = {
    "/nope": "is not a command",
    "/save": "needs a file",
    "/save new.jsonl": "nothing to save",
    "hi|/save {}/there.jsonl": "cannot be written",
    "/retry": "no message to answer",
    "/quit now": "takes nothing",
    "/image a.png": "reads text alone",
    "x" * 3000: "raise --context",
    "x" * 1_000_001: "is longer than",
    "\udcff": "is no text in UTF-8",
}


def one_message(words: list[str], said: str) -> str:
    assert said.count("error: ") == 1 and said.count("remedy: ") == 1 and "Traceback" not in said, (words, said[-2000:])
    return said[said.index("error: ") :]


def chat(words: list[str], lines: bytes, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    monkeypatch.setattr(command, "set_float32_matmul", lambda *choice: None)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("blockwright.training.data.chat.template_process.PROCESS.seconds", 0.3)
    return run_command(run, ["chat", *words])


@pytest.mark.parametrize("line", [*OF_A_MODEL, *OF_A_CHAT])
def test_chat_that_cannot_be_is_one_message(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert chat(line.split(), b"hi\n", monkeypatch) == 64
    said = capsys.readouterr()
    assert {**OF_A_MODEL, **OF_A_CHAT}[line] in one_message(line.split(), said.err) and not said.out
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line", OF_A_LINE, ids=lambda line: repr(line[:30]))
def test_line_that_cannot_be_is_one_message(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = line.format(folder).replace("|", "\n").encode(errors="surrogateescape")
    assert chat([str(folder / "good"), "--max-new-tokens", "2"], lines, monkeypatch) == 64
    assert OF_A_LINE[line] in one_message([line], capsys.readouterr().err)
    assert (folder / "there.jsonl").read_text() == "kept"


def test_model_that_cannot_be_loaded_is_one_error(folder: Path) -> None:
    for name, says in OF_A_MODEL.items():
        with pytest.raises(ConfigError) as refusal:
            blockwright.load(folder / name)
        assert says in str(refusal.value) and refusal.value.remedy


@pytest.mark.parametrize(("given", "says"), [({"dtype": "int8"}, "not supported"), ({"device": "banana"}, "no such")])
def test_load_refuses_dtypes_and_devices_as_commands_do(given: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        blockwright.load(folder / "good", **given)


def test_load_says_which_weights_it_took(folder: Path, tmp_path: Path) -> None:
    assert blockwright.load(folder / "good").read_from == f"{folder}/good/checkpoints/last.ckpt, step 1,200"
    averaged = torch.load(folder / "good" / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("last", "best", "last.previous"):
        torch.save({**averaged, "current_model_state": averaged["state_dict"]}, tmp_path / f"{name}.ckpt")
    said = blockwright.load(tmp_path / "last.ckpt").read_from
    assert said == f"{tmp_path}/last.ckpt, step 1,200, a moving average of the weights, next to best.ckpt"
    assert (blockwright.load(tmp_path / "best.ckpt").read_from or "").endswith("next to last.ckpt")
