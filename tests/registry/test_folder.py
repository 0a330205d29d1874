"""Files of folders that may be untrusted: one way to read them, within limits."""

from __future__ import annotations

import ast
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.folder import own_folder, read_bytes, read_json, read_text, read_yaml
from blockwright.registry.readable import find_readable
from blockwright.registry.references import References
from blockwright.training.configuration.instantiate import build_readable
from blockwright.training.data.corpus import Corpus
from blockwright.training.data.tokenizers.base import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("src", "registry", "blocks", "training", "lab", "plugins")
READERS = (
    "json.load",
    "json.loads",
    "yaml.load",
    "yaml.safe_load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "omegaconf.OmegaConf.load",
)
READERS += ("pickle.load", "pickle.loads", "joblib.load", "torch.load", "numpy.load")
METHODS = ("read_text", "read_bytes")
# Where a file or a text is read otherwise, and what it is.
ELSEWHERE = {
    "registry/limits.py yaml.load": "the mechanism itself, a SafeLoader",
    "registry/folder.py json.loads": "the mechanism itself",
    "lab/definitions.py yaml.safe_load": "a text that read_text has bounded, of a file that the user names",
    "lab/sweep/forking.py json.loads": "what this program and the process that it starts say to each other",
    "lab/evaluate.py read_text": "the source of installed packages",
    "src/blockwright/completion.py read_text": "the source of installed packages",
    "registry/index.py read_text": "the source of installed packages",
    "plugins/serve/app.py read_text": "a file of this package",
    "plugins/studio/app.py read_bytes": "files of this package",
    "lab/drawing/page.py read_text": "a file of this package",
    "src/blockwright/lazy.py read_text": "a file of this package",
    "src/blockwright/commands.py read_text": "a module of an installed package",
    "training/configuration/conf.py read_text": "the configuration of this project",
    "training/configuration/conf.py yaml.safe_load": "the configuration of this project",
    "src/blockwright/api.py read_text": "files of this package",
    "lab/calibration/record.py read_bytes": "files of this package",
    "lab/report/svg.py read_text": "a file of this package",
    "lab/difference/picture.py read_text": "files of this package",
    "lab/report/page.py read_text": "files of this package",
    "lab/catalogue.py read_text": "a page and the configuration of this project",
    "lab/catalogue.py yaml.safe_load": "the configuration of this project",
    "training/data/shakespeare.py read_text": "files of an installed package",
    "blocks/kernels/machine.py read_text": "a file of the kernel",
    "training/data/chat/template.py read_text": "a file of the kernel",
    "registry/replacing.py read_text": "a file of the kernel",
    "training/csv_logger.py read_bytes": "the table of this run, which it resumes",
    "training/entry/cli.py read_text": "a configuration that the user names",
    "training/claims.py read_text": "a lock that this process has opened, and a file of the kernel",
    "training/data/mixture/module.py json.loads": "what a process of this run has prepared",
    "training/data/mixture/readers.py json.loads": "a record of the user's text, which is tokenised",
    "training/data/mixture/readers.py read_text": "the user's text, which is tokenised",
    "training/data/kernel_documentation.py read_bytes": "files of an installed package",
    "training/answering.py json.loads": "an answer of limited length, and a question of this program",
    "training/data/packing.py read_text": "the project's own cache",
    "training/data/packing.py json.loads": "the project's own cache",
    "training/data/conversations.py json.loads": "a record of the user's data, in training",
    "plugins/alignment/sandbox/boxed/judge.py json.load": "what the parent writes",
    "plugins/alignment/sandbox/boxed/program.py json.load": "what the parent writes",
    "plugins/alignment/sandbox/boxed/exchange.py json.loads": "a line of limited length, from an untrusted program",
    "plugins/alignment/rewards/reasoning_gym.py json.loads": "a column that this process wrote",
    "plugins/alignment/tasks/reference.py numpy.load": "the project's own cache",
    "plugins/kubernetes/cluster.py json.loads": "what kubectl prints",
    "plugins/kubernetes/watch.py json.loads": "what a pod of this sweep wrote",
    "blocks/checkpoint/shards.py json.loads": "the header of a file, which safetensors has bounded",
    "blocks/conformance/setting.py json.loads": "a text of this package",
    "blocks/conformance/construction.py torch.load": "a file that the check has written",
    "blocks/checkpoint/sharded.py torch.load": "a checkpoint",
    "blocks/checkpoint/read.py torch.load": "a checkpoint",
    "training/checkpoints/record.py torch.load": "a checkpoint",
}
SAFELY = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def reading(text: str) -> Iterator[tuple[str, ast.Call]]:
    """Name of each call in a program that reads a file or a text of one, by whatever name it is imported."""
    nodes, imported = list(ast.walk(ast.parse(text))), dict[str, str]()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported |= {a.asname or a.name: module + a.name for a in node.names if a.asname or module}
    for node in nodes:
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            name = ".".join((imported.get(first, first), *rest))
            if name in READERS or (rest and rest[-1] in METHODS):
                yield name if name in READERS else rest[-1], node


WORDS = {name.rpartition(".")[2] for name in (*READERS, *METHODS)}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """File and name of each call of this project that reads a file or a text of one."""
    for source in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "tests" not in p.parts):
        text = source.read_text()
        for name, node in reading(text) if any(reader in text for reader in WORDS) else ():
            yield f"{source.relative_to(ROOT)} {name}", node


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("import json\njson.load(f)", "json.load"),
        ("from yaml import safe_load as read\nread(f)", "yaml.safe_load"),
        ("def f():\n    import numpy as n\n    n.load(f)", "numpy.load"),
        ("from omegaconf import OmegaConf\nOmegaConf.load(f)", "omegaconf.OmegaConf.load"),
        ("(Path(f) / 'a.b').read_text()", "read_text"),
    ],
)
def test_reading_is_found_by_whatever_name(program: str, name: str) -> None:
    assert [found for found, _ in reading(program)] == [name]


def test_files_are_read_in_one_place_and_no_reader_unpickles() -> None:
    every = list(calls())
    found = {where for where, _ in every}
    assert not found - set(ELSEWHERE), (
        "read files of folders by blockwright.registry.folder, or say why not in ELSEWHERE"
    )
    assert not set(ELSEWHERE) - found, "these are gone"
    for where, node in every:
        name = where.split()[1]
        assert not name.startswith(("pickle.", "joblib.")), where
        if name in SAFELY:
            key, value = SAFELY[name]
            given = {k.arg: k.value for k in node.keywords}
            assert isinstance(given.get(key), ast.Constant) and given[key].value is value, where  # type: ignore[union-attr]


def refusal(tmp_path: Path, name: str) -> ConfigError:
    read = read_json if name.endswith(".json") else read_yaml if name.endswith(".yaml") else read_text
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, name)
    return caught.value


BOMB = "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.yaml", BOMB, "expands to more than"),
        ("a.yaml", "[" * 200, "deep"),
        ("a.yaml", "a: &a [*a]", "contains itself"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
        ("a.yaml", "x" * 100_001, "longer"),
        ("a.json", "[" * 900 + "]" * 900, "deep"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.json", "{", "JSON"),
        ("a.json", "1" * 5000, "JSON"),
    ],
)
def test_file_beyond_the_limits_is_refused(name: str, text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    error = refusal(tmp_path, name)
    assert rule in error.rule and error.path == str(tmp_path / name)


def test_what_is_no_file_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "environment").symlink_to("/proc/self/environ")
    (tmp_path / "secret").write_text("s")
    (folder / "above").symlink_to(tmp_path / "secret")
    (folder / "circle").symlink_to("circle")
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "environment", "above", "circle", "huge", "none", "."):
        assert refusal(folder, name).remedy
    with pytest.raises(ConfigError, match="is a link"):
        (folder / "report").symlink_to(tmp_path)
        own_folder(folder, "report")


def test_links_within_a_folder_and_into_the_hubs_cache_are_read(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "f00"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(blob)
    (snapshot / "same.json").symlink_to("config.json")
    assert read_json(snapshot, "config.json") == read_json(snapshot, "same.json") == {}
    assert read_bytes(snapshot, "config.json") == b"{}"


def test_yaml_is_read_as_omegaconf_does_and_nothing_is_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "secret")
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: ${oc.env:CANARY}\nc: on\n")
    assert read_yaml(tmp_path, "a.yaml") == {"a": 1e-3, "b": "${oc.env:CANARY}", "c": True}


ROOTS: dict[str, Any] = {
    "seed": 3,
    "paths": {"root": "/x", "data": "${paths.root}/d"},
    "loop": "${loop}",
    "m": {"a": 1},
}


def test_references_give_values_of_the_same_file() -> None:
    found = References(ROOTS, "f", "r").resolve({"a": ["${seed}", "${paths.data}/*.txt"], "b": None})
    assert found == {"a": [3, "/x/d/*.txt"], "b": None}


@pytest.mark.parametrize(
    "text",
    ["${oc.env:HOME}", "x${oc.env:HOME}", "${hydra:runtime.cwd}", "${loop}", "${m}", "${none}", "${.a}", "${${seed}}"],
)
def test_other_interpolations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        References(ROOTS, "f", "r").resolve(text)
    assert caught.value.remedy == "r"


def test_references_that_double_end_at_the_limit() -> None:
    for first in ("xxxxxxxxxx", ""):
        root = {"s0": first, **{f"s{i}": f"${{s{i - 1}}}" * 10 for i in range(1, 40)}}
        with pytest.raises(ConfigError):
            References(root, "f", "r").resolve("${s39}")


@pytest.mark.parametrize(
    "value", ["${long}" * 2000, ["${long}x"] * 2000, ["${long}"] * 2000], ids=["one", "many", "whole"]
)
def test_references_to_a_long_text_end_at_the_limit(value: Any) -> None:
    """Before it is joined, and over all values of the file."""
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="come to more than"):
            References({"long": "x" * 10_000}, "f", "r").resolve(value)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_only_declared_classes_are_found() -> None:
    assert find_readable("blockwright.training.data.text.TextFiles", Corpus)
    for other in (
        "os.system",
        "blockwright.training.data.corpus.Corpus",
        "blockwright.training.data.text.np.load",
        None,
        3,
        "a",
        "blockwright.training.data.",
    ):
        assert find_readable(other, Corpus) is None
    assert find_readable("blockwright.training.data.text.TextFiles", Tokenizer) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"_partial_": True},
        {"separator": {"_target_": "os.system"}},
        {"files": {"a": "b"}},
        {"nothing": 1},
        {"val_fraction": "x"},
        {"_target_": "os.system"},
    ],
)
def test_declared_classes_take_their_own_plain_arguments(changes: dict[str, Any]) -> None:
    node = {"_target_": "blockwright.training.data.text.TextFiles", "files": "a.txt"}
    assert build_readable(node, Corpus, "data.corpus", "r", files=True)
    with pytest.raises(ConfigError) as caught:
        build_readable({**node, **changes}, Corpus, "data.corpus", "r", files=True)
    assert caught.value.path.startswith("data.corpus")


def test_a_damaged_file_counts_as_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match="JSON"):
        read_json(tmp_path, "a.json")
