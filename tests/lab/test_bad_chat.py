"""What is wrong in a chat, or in a model to load, is one message: of the command line, the model, a line."""

import io
import json
import sys

import chat_folder
import pytest
import torch

import blockwright
from blockwright.command import run
from blockwright.lab.chat import __main__ as command
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("bad_chat")  # its fixture is slow to set up

LONG = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Models, good and bad, each in a folder of its name."""
    base = tmp_path_factory.mktemp("models")

    def save(name, template=chat_folder.TEMPLATE, trained=None, **changes):
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


def test_load_says_which_weights_it_took(folder, tmp_path):
    assert blockwright.load(folder / "good").read_from == f"{folder}/good/checkpoints/last.ckpt, step 1,200"
    averaged = torch.load(folder / "good" / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("last", "best", "last.previous"):
        torch.save({**averaged, "current_model_state": averaged["state_dict"]}, tmp_path / f"{name}.ckpt")
    said = blockwright.load(tmp_path / "last.ckpt").read_from
    assert said == f"{tmp_path}/last.ckpt, step 1,200, a moving average of the weights, next to best.ckpt"
    assert (blockwright.load(tmp_path / "best.ckpt").read_from or "").endswith("next to last.ckpt")


OF_A_MODEL = {
    "nowhere": "no such file or folder",
    "empty": "holds neither",
    "small": "cannot be loaded safely",
    "hf": "model.safetensors",
    "of_none": "is not a known architecture",
    "no.gguf": "cannot be read as GGUF",
}
OF_A_CHAT = {
    "nowhere": "no such file",
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
    "good --temperature nan": "temperature",
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


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a chat says that must be refused."""

    def chat(words, lines):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        monkeypatch.setattr(command, "multiply_fastest", lambda *models: None)
        monkeypatch.setattr(command, "keep_freed_memory", lambda: None)
        monkeypatch.setattr("blockwright.training.data.chat.jinja.PROCESS.seconds", 0.3)
        assert run_command(run, ["chat", *words]) == 64
        said = capsys.readouterr()
        assert said.err.count("error: ") == 1 and said.err.count("remedy: ") == 1 and "Traceback" not in said.err
        return said

    return chat


@pytest.mark.parametrize("line", OF_A_CHAT)
def test_chat_that_cannot_be_is_one_message(line, folder, monkeypatch, refused):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    said = refused(line.split(), b"hi\n")
    assert OF_A_CHAT[line] in said.err and not said.out and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line", OF_A_LINE, ids=lambda line: repr(line[:30]))
def test_line_that_cannot_be_is_one_message(line, folder, refused):
    lines = line.format(folder).replace("|", "\n").encode(errors="surrogateescape")
    assert OF_A_LINE[line] in refused([str(folder / "good"), "--max-new-tokens", "2"], lines).err
    assert (folder / "there.jsonl").read_text() == "kept"


def test_model_that_cannot_be_loaded_is_one_error(folder):
    for name, says in OF_A_MODEL.items():
        with pytest.raises(ConfigError) as refusal:
            blockwright.load(folder / name)
        assert says in str(refusal.value) and refusal.value.remedy
    for given, says in (({"dtype": "int8"}, "not supported"), ({"device": "banana"}, "no such")):
        with pytest.raises(ConfigError, match=says):
            blockwright.load(folder / "good", **given)
