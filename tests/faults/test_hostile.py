"""Hostile files: nothing of them runs, writes or reads a secret, and each is refused at once by its path."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from quickest import takes_less
from safetensors.torch import save_file

from blockwright import registry
from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.blocks.checkpoint.source import load, open_source, read_composition
from blockwright.blocks.compose import check, compose
from blockwright.registry import ConfigError, RegistrationError
from blockwright.training.checkpoints.saving import SealedCheckpoints
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.preflight import preflight

SECRET = "hunter2-hunter2"
MODEL: dict[str, Any] = {
    "vocab_size": 61, "d_model": 48, "n_layers": 2, "max_positions": 64, "init": {"std": 0.05, "depth_scaled": False},
    "attention": {"name": "gqa"}, "position": {"name": "rope"},
    "ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 8}},
    "gating": {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert", "alpha": 0.01}},
    "experts": {"name": "swiglu", "d_ff": 12}, "norm": {"name": "rmsnorm"}, "residual": {"name": "prenorm"},
    "variants": {"ffn": {"dense": {"name": "swiglu", "d_ff": 40}}}, "layout": {"ffn": "dense*1 ffn*"},
}  # fmt: skip
TEXT = yaml.safe_dump(MODEL)
CALL = {"_target_": "os.system", "command": "touch ran"}


class Runs:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def at(path: str, value: Any) -> dict[str, Any]:
    """The model with a value at a dotted path."""
    model: dict[str, Any] = json.loads(json.dumps(MODEL))
    *parents, last = path.split(".")
    node: Any = model
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return model


def doubled(times: int) -> list[Any]:
    """A list that stands for 2 to the power of ``times`` values: each level holds the one below twice."""
    inner: list[Any] = [1]
    for _ in range(times):
        inner = [inner, inner]
    return inner


def deep(times: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(times):
        inner = {"a": inner}
    return inner


def bomb(levels: int, each: int = 9) -> str:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * each)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["m0: &m0 {k0: 0}"]
    lines += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], k{i}: 0}}" for i in range(1, levels)]
    return "\n".join(lines)


def strings(levels: int) -> str:
    return "\n".join(["s0: xxxxxxxxxx"] + [f"s{i}: '{f'${{s{i - 1}}}' * 10}'" for i in range(1, levels)])


PLACES = ("attention", "position", "ffn", "ffn.shared", "gating", "gating.balance", "experts", "norm", "residual")
PLACES = (*PLACES, "init", "layout", "variants.ffn.dense", "variants.ffn", "variants", "mtp")

MODELS: dict[str, Any] = {
    **{f"dotted target in {place}": at(f"{place}._target_", "os.system") for place in PLACES},
    "dotted target at the root": {**MODEL, **CALL},
    "dotted target in an override": at("overrides", [{"layers": 0, "ffn": CALL}]),
    "dotted target in a list of children": at("gating.balance", [CALL]),
    "partial": at("attention._partial_", True),
    "arguments": at("attention._args_", ["touch ran"]),
    "name with dots": at("attention.name", "os.system"),
    "name that is a path": at("attention.name", "../../evil"),
    "name that is a module": at("attention.name", "blockwright.blocks.attention.mla"),
    "name with a null byte": at("attention.name", "gqa\0"),
    "hydra node": {**MODEL, "hydra": {"run": {"dir": "/tmp/x"}}},
    "paths node": {**MODEL, "paths": {"output_dir": "/tmp/x"}},
    "defaults list": {**MODEL, "defaults": [{"override /hydra/launcher": "joblib"}]},
    "callbacks node": {**MODEL, "callbacks": {"a": CALL}},
    "environment by resolver": at("attention.name", "${oc.env:SECRET_TOKEN}"),
    "environment in a key": {**MODEL, "${oc.env:SECRET_TOKEN}": 1},
    "environment within text": at("layout.ffn", "x ${oc.env:SECRET_TOKEN}"),
    "environment decoded": at("d_model", "${oc.decode:${oc.env:SECRET_TOKEN}}"),
    "resolver of hydra": at("attention.name", "${hydra:runtime.cwd}"),
    "reference to a node": at("variants.ffn.other", "${variants}"),
    "list that stands for 2^60 values": at("overrides", doubled(60)),
    "two thousand levels": at("variants", deep(2000)),
    "integer of 4000 digits": at("d_model", 10**4000),
    "integer beyond an address": at("experts.d_ff", 2**70),
    "negative size": at("d_model", -(2**40)),
    "infinite float": at("init.std", float("inf")),
    "a million layers": {**MODEL, "n_layers": 10**6},
    "more parameters than any machine": {**MODEL, "d_model": 2**30, "attention": {"name": "gqa", "n_heads": 8}},
    "experts without end": at("ffn.n_experts", 2**50),
    "positions without end": {**MODEL, "max_positions": 2**45, "position": {"name": "learned"}},
    "vocabulary without end": {**MODEL, "vocab_size": 2**52},
    "depths without end": {**MODEL, "mtp": {"depth": 10**9}},
    "range of layers without end": at("overrides", [{"layers": "0..999999999", "ffn": "swiglu"}]),
    "pattern that repeats without end": at("layout.ffn", "ffn*999999999"),
    "pattern of nested groups": at("layout.ffn", "(" * 10000 + "ffn" + ")" * 10000),
    "pattern of a megabyte": at("layout.ffn", "ffn " * 300_000),
    "thousands of different layers": {
        **MODEL, "n_layers": 3000, "overrides": [{"layers": i, "ffn": {"d_ff": i}} for i in range(1, 2500)],
    },
    "block within itself": at("ffn.shared", {"name": "moe", "n_experts": 2, "shared": {"name": "moe"}}),
    "object": at("attention", Runs()),
    "bytes": at("attention.name", b"gqa"),
    "class": at("attention.name", os.system),
}  # fmt: skip

TEXTS: dict[str, str] = {
    "alias bomb": f"{TEXT}\nvariants:\n" + "\n".join(f"  {line}" for line in bomb(12).splitlines()),
    "merge bomb": merges(9), "interpolation bomb": strings(9),
    "anchor that holds itself": "attention: &a {name: gqa, inner: *a}",
    "list that holds itself": "overrides: &o [*o]", "brackets without end": "a: " + "[" * 50_000,
    "mappings without end": "a: " + "{a: " * 20_000, "five megabytes": "a: " + "x" * 5_000_000,
    "many keys": "\n".join(f"k{i}: 1" for i in range(18_000)),
    "python object": "attention: !!python/object/apply:os.system ['touch ran']",
    "python module": "attention: !!python/module:os", "python name": "attention: !!python/name:os.system",
    "duplicate keys": "d_model: 1\nd_model: 2", "two documents": "a: 1\n---\nb: 2",
    "control characters": "a: \x07\x00", "a bare list": "[1, 2]",
    "sexagesimal depth": TEXT.replace("n_layers: 2", "n_layers: 12:30:00:00"),
    "date for a size": TEXT.replace("d_model: 48", "d_model: 2026-11-25"), "binary": "attention: !!binary R0lG",
}  # fmt: skip


def checkpoint(tmp: Path, model: Any = None, **more: Any) -> Path:
    """A file like a checkpoint of training, with a model of the sender's choice."""
    torch.save(
        {"state_dict": {}, "hyper_parameters": {"model": MODEL if model is None else model}, **more}, tmp / "x.ckpt"
    )
    return tmp / "x.ckpt"


def raw_pickle(tmp: Path) -> Path:
    (tmp / "x.ckpt").write_bytes(pickle.dumps(Runs()))
    return tmp / "x.ckpt"


def zip_with_pickle(tmp: Path) -> Path:
    with zipfile.ZipFile(tmp / "x.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs()))
        archive.writestr("archive/version", "3")
    return tmp / "x.ckpt"


def shards(tmp: Path) -> Path:
    """A folder like one of torch.distributed.checkpoint, whose index would run a command."""
    (tmp / "x.ckpt").mkdir()
    (tmp / "x.ckpt" / ".metadata").write_bytes(pickle.dumps(Runs()))
    torch.save({"x": Runs()}, tmp / "x.ckpt" / "meta.pt")
    return tmp / "x.ckpt"


def shards_from_elsewhere(tmp: Path) -> Path:
    """A sound folder of torch.distributed.checkpoint, but that its index sends the reader to another folder's file."""
    folder = tmp / "x.ckpt"
    dcp.save({"state_dict.a": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    torch.save({"hyper_parameters": {"model": MODEL}}, folder / "meta.pt")
    index = pickle.loads((folder / ".metadata").read_bytes())
    for key, info in index.storage_data.items():
        index.storage_data[key] = dataclasses.replace(info, relative_path=f"../{info.relative_path}")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def imported(tmp: Path, text: str = TEXT) -> Path:
    (tmp / "in").mkdir()
    (tmp / "in" / "model.yaml").write_text(text)
    save_file({"a": torch.ones(1)}, tmp / "in" / "model.safetensors")
    return tmp / "in"


def written(tmp: Path, text: str) -> Path:
    (tmp / "hostile.yaml").write_text(text)
    return tmp / "hostile.yaml"


def run_with(file: Path, *overrides: str) -> Any:
    return preflight(
        compose_config(["model=file", f"model.file={file}", *overrides], output_dir=str(file.parent / "o"))
    )


def clash(kind: str, name: str) -> Any:
    return registry.register(kind, name)(type("Second", (registry.lookup("norm", "layernorm").cls,), {}))


FILES: dict[str, Callable[[Path], Any]] = {
    "checkpoint that is a pickle": lambda tmp: read_checkpoint(raw_pickle(tmp)),
    "checkpoint whose zip holds a pickle": lambda tmp: read_checkpoint(zip_with_pickle(tmp)),
    "checkpoint with an object in its weights": lambda tmp: read_checkpoint(checkpoint(tmp, state_dict={"a": Runs()})),
    "checkpoint with an object elsewhere": lambda tmp: read_checkpoint(checkpoint(tmp, callbacks=Runs())),
    "checkpoint with a target": lambda tmp: load(checkpoint(tmp, at("ffn._target_", "os.system"))),
    "checkpoint that reads the environment": lambda tmp: load(
        checkpoint(tmp, at("norm.name", "${oc.env:SECRET_TOKEN}"))
    ),
    "checkpoint that stands for too much": lambda tmp: load(checkpoint(tmp, at("overrides", doubled(60)))),
    "checkpoint of a size": lambda tmp: load(checkpoint(tmp, {**MODEL, "vocab_size": 2**34})),
    "checkpoint at an address": lambda tmp: read_checkpoint("http://127.0.0.1:9/x.ckpt"),
    "address for the trainer": lambda tmp: SealedCheckpoints().load_checkpoint("https://h/x", None, False),
    "checkpoint for the trainer": lambda tmp: SealedCheckpoints().load_checkpoint(raw_pickle(tmp), None, False),
    "folder of shards": lambda tmp: read_checkpoint(shards(tmp)),
    "folder of shards as a source": lambda tmp: open_source(shards(tmp)),
    "folder of shards that points above": lambda tmp: read_checkpoint(shards_from_elsewhere(tmp)),
    "run's file with a target": lambda tmp: run_with(written(tmp, yaml.safe_dump(at("norm._target_", "os.system")))),
    "run's file that sets hydra": lambda tmp: run_with(
        written(tmp, f"# @package _global_\n{TEXT}\nhydra: {{run: {{dir: /}}}}")
    ),
    "run's file that reads the environment": lambda tmp: run_with(
        written(tmp, TEXT.replace("rmsnorm", "${oc.env:SECRET_TOKEN}"))
    ),
    "run's file that is a device": lambda tmp: run_with(Path("/dev/zero")),
    "run's file that is no text": lambda tmp: run_with(written(tmp, ""), "+model.x=1"),
    "imported model with a target": lambda tmp: read_composition(
        imported(tmp, yaml.safe_dump(at("ffn._target_", "x")))
    ),
    "imported model that is a bomb": lambda tmp: read_composition(imported(tmp, bomb(12))),
    "imported model of ten megabytes": lambda tmp: read_composition(imported(tmp, "a: " + "x" * 10**7)),
    "plug-in that takes a name": lambda tmp: clash("norm", "rmsnorm"),
    "plug-in with a dotted name": lambda tmp: clash("norm", "os.system"),
    "plug-in of no family": lambda tmp: clash("os", "system"),
}  # fmt: skip


class Watch:
    """Sees what this process starts, connects to, or writes outside of a folder; hooks stay, so it is switched."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "ctypes.dlopen"):
            self.seen.append(f"{event} {arguments!r:.200}")
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes and isinstance(arguments[0], str) and not arguments[0].startswith(str(self.inside)):
            self.seen.append(f"written: {arguments[0]}")
        if event == "import" and arguments[0].partition(".")[0] in ("evil", "pip"):
            self.seen.append(f"imported: {arguments[0]}")


_watch: list[Watch] = []


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    registry.load()
    if not _watch:
        _watch.append(Watch())
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    _watch[0].inside, _watch[0].seen = tmp_path, []
    yield _watch[0]
    _watch[0].inside = None


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Whatever is imported late, and the default composition: not the work of a refusal."""
    compose(MODEL)
    compose_config([], output_dir="x")


def refused(action: Callable[[], Any], watch: Watch, tmp_path: Path) -> ConfigError | RegistrationError:
    before, errors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []

    def refuse() -> None:
        with pytest.raises((ConfigError, RegistrationError)) as caught:
            action()
        errors.append(caught.value)

    assert takes_less(1, refuse)
    error = errors[-1]
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    watch.inside = None
    assert watch.seen == [] and not list(tmp_path.rglob("ran")) and not (tmp_path / "out").exists()
    assert SECRET not in str(error) and len(str(error)) < 3000
    assert megabytes < 200, f"{megabytes:.0f} MB"
    if isinstance(error, ConfigError):
        assert error.path and error.rule and error.remedy
    return error


@pytest.mark.parametrize("name", MODELS)
def test_hostile_model_is_refused(name: str, watch: Watch, tmp_path: Path) -> None:
    error = refused(lambda: compose(MODELS[name]), watch, tmp_path)
    assert isinstance(error, ConfigError) and error.path.startswith("model")


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_text_is_refused(name: str, watch: Watch, tmp_path: Path) -> None:
    error = refused(lambda: check(TEXTS[name]), watch, tmp_path)
    assert isinstance(error, ConfigError) and error.path.startswith("model")


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_refused(name: str, watch: Watch, tmp_path: Path) -> None:
    refused(lambda: FILES[name](tmp_path), watch, tmp_path)


def test_there_are_many_and_the_model_that_they_are_made_of_is_good(watch: Watch) -> None:
    assert len(MODELS) + len(TEXTS) + len(FILES) >= 50
    assert check(TEXT) and check(MODEL)
