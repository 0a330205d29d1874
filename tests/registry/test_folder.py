"""Files of folders that may be untrusted: one way to read them, within limits of bytes, values, depth and size."""

from __future__ import annotations

import ast
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.folder import References, own_folder, read_bytes, read_json, read_text, read_yaml
from blockwright.registry.index import find_readable
from blockwright.registry.limits import MAX_BYTES, MAX_DEPTH, MAX_INTEGER, MAX_NODES, check_text, check_values
from blockwright.registry.limits import read_text as read_plain
from blockwright.training.configuration.instantiate import build_readable
from blockwright.training.data.corpus import Corpus
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("src", "registry", "blocks", "training", "lab", "plugins")
READERS = [
    "json.load",
    "json.loads",
    "yaml.load",
    "yaml.safe_load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "pickle.load",
]
READERS += ["pickle.loads", "joblib.load", "torch.load", "numpy.load", "omegaconf.OmegaConf.load"]
METHODS = ("read_text", "read_bytes")
# What a file or a text is that is read otherwise, and where.
REASONS: dict[str, list[str]] = {
    "the mechanism itself, a SafeLoader; or a text of limited length": [
        "blocks/checkpoint/shards.py json.loads", "lab/definitions.py yaml.safe_load",
        "plugins/alignment/sandbox/boxed/exchange.py json.loads", "registry/folder.py json.loads",
        "registry/limits.py yaml.load", "training/answering.py json.loads",
    ],
    "what this program has written, or one that it has started prints": [
        "blocks/conformance/construction.py torch.load", "lab/sweep/forking.py json.loads",
        "plugins/alignment/rewards/rewards.py json.loads", "plugins/alignment/sandbox/boxed/judge.py json.load",
        "plugins/alignment/sandbox/boxed/program.py json.load", "plugins/alignment/tasks/pairs.py numpy.load",
        "plugins/kubernetes/cluster.py json.loads", "plugins/kubernetes/watch.py json.loads",
        "training/csv_logger.py read_bytes", "training/data/mixture/module.py json.loads",
        "training/data/packing.py json.loads", "training/data/packing.py read_text",
    ],
    "files of an installed package": [
        "lab/evaluate.py read_text", "registry/index.py read_text", "src/blockwright/commands.py read_text",
        "src/blockwright/completion.py read_text", "training/data/corpora.py read_bytes",
        "training/data/corpora.py read_text",
    ],
    "files of this package, and the configuration of this project": [
        "blocks/conformance/setting.py json.loads", "lab/calibration/record.py read_bytes",
        "lab/catalogue.py read_text", "lab/catalogue.py yaml.safe_load", "lab/difference/views.py read_text",
        "lab/drawing/picture.py read_text", "lab/report/page.py read_text", "lab/report/svg.py read_text",
        "lab/new.py read_text", "lab/schemas.py read_text", "lab/schemas.py yaml.safe_load",
        "plugins/serve/app.py read_text", "plugins/studio/app.py read_bytes", "src/blockwright/api.py read_text",
        "src/blockwright/lazy.py read_text", "training/configuration/conf.py read_text",
        "training/configuration/conf.py yaml.safe_load",
    ],
    "a file of the kernel, or a lock that this process has opened": [
        "blocks/kernels/machine.py read_text", "blocks/kernels/timing.py read_text", "registry/folder.py read_text",
        "training/claims.py read_text", "training/data/chat/template.py read_text",
    ],
    "text, records and a configuration that the user names": [
        "training/data/conversations.py json.loads", "training/data/mixture/readers.py json.loads",
        "training/data/mixture/readers.py read_text", "training/entry/cli.py read_text",
    ],
    "a checkpoint": [
        "blocks/checkpoint/read.py torch.load", "blocks/checkpoint/sharded.py torch.load",
        "training/checkpoints/record.py torch.load",
    ],
}  # fmt: skip
ELSEWHERE = {where for places in REASONS.values() for where in places}
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


def test_files_are_read_in_one_place_and_no_reader_unpickles() -> None:
    every = list(calls())
    found = {where for where, _ in every}
    assert not found - ELSEWHERE, "read files of folders by blockwright.registry.folder, or say why not in REASONS"
    assert not ELSEWHERE - found, "these are gone"
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
BEYOND = {
    "a.yaml": [BOMB, "[" * 200, "a: &a [*a]", "a: !!python/object/apply:os.system [ls]", "x" * 100_001],
    "a.json": ["[" * 900 + "]" * 900, "[" * 100_000, "{", "1" * 5000],
}


def test_file_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    for name, texts in BEYOND.items():
        for text in texts:
            (tmp_path / name).write_text(text)
            error = refusal(tmp_path, name)
            assert error.path == str(tmp_path / name) and isinstance(error, ValueError), text[:40]


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
    (folder / "report").symlink_to(tmp_path)
    with pytest.raises(ConfigError):
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
OTHERS = "${oc.env:HOME} x${oc.env:HOME} ${hydra:runtime.cwd} ${loop} ${m} ${none} ${.a} ${${seed}}"


def test_references_give_values_of_the_same_file_and_other_interpolations_are_refused() -> None:
    found = References(ROOTS, "f", "r").resolve({"a": ["${seed}", "${paths.data}/*.txt"], "b": None})
    assert found == {"a": [3, "/x/d/*.txt"], "b": None}
    for text in OTHERS.split():
        with pytest.raises(ConfigError) as caught:
            References(ROOTS, "f", "r").resolve(text)
        assert caught.value.remedy == "r", text


def test_references_end_at_the_limit_before_they_are_joined_and_over_all_values() -> None:
    for first in ("xxxxxxxxxx", ""):
        root = {"s0": first, **{f"s{i}": f"${{s{i - 1}}}" * 10 for i in range(1, 40)}}
        with pytest.raises(ConfigError):
            References(root, "f", "r").resolve("${s39}")
    long: list[Any] = ["${long}" * 2000, ["${long}x"] * 2000, ["${long}"] * 2000]
    for value in long:
        tracemalloc.start()
        try:
            with pytest.raises(ConfigError):
                References({"long": "x" * 10_000}, "f", "r").resolve(value)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()


TEXTS = "blockwright.training.data.corpus.TextFiles"


def test_only_declared_classes_are_found() -> None:
    assert find_readable(TEXTS, Corpus) and find_readable(TEXTS, Tokenizer) is None
    inner = ("blockwright.training.data.corpus.Corpus", "blockwright.training.data.corpus.np.load")
    for other in (*inner, "os.system", None, 3, "a", "blockwright.training.data."):
        assert find_readable(other, Corpus) is None


def test_declared_classes_take_their_own_plain_arguments() -> None:
    node = {"_target_": TEXTS, "files": "a.txt"}
    assert build_readable(node, Corpus, "data.corpus", "r", files=True)
    wrong: list[dict[str, Any]] = [{"_partial_": True}, {"separator": {"_target_": "os.system"}}, {"files": {"a": "b"}}]
    for changes in (*wrong, {"nothing": 1}, {"val_fraction": "x"}, {"_target_": "os.system"}):
        with pytest.raises(ConfigError) as caught:
            build_readable({**node, **changes}, Corpus, "data.corpus", "r", files=True)
        assert caught.value.path.startswith("data.corpus"), changes


# --- limits; what hostile ones try: tests/faults/test_hostile.py ------------------------------------------------------


def test_at_the_limit_it_passes_and_beyond_it_does_not() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    pairs: list[tuple[Any, Any]] = [(list(range(MAX_NODES - 1)), list(range(MAX_NODES))), (deep, [deep])]
    pairs += [({"a": sign * MAX_INTEGER}, {"a": sign * (MAX_INTEGER + 1)}) for sign in (1, -1)]
    for good, bad in pairs:
        check_values(good, "model")
        with pytest.raises(ConfigError):
            check_values(bad, "model")


def test_text_is_measured_with_its_aliases_spelt_out() -> None:
    twice = "a: &a [1, 1, 1]\nb: &b [{0}]\nc: [{1}]"
    check_text(twice.format(", ".join(["*a"] * 10), ", ".join(["*b"] * 10)), "model")
    for text in (twice.format(", ".join(["*a"] * 100), ", ".join(["*b"] * 100)), "[" * 40 + "]" * 40):
        with pytest.raises(ConfigError):
            check_text(text, "model")


def test_values_are_refused_at_their_place_and_only_an_own_configuration_may_refer() -> None:
    check_values({"a": "${b}"}, "model", data=False)
    for value, path in (({"a": [{"b": 2**60}]}, "model.a.0.b"), ({"a": "${b}"}, "model.a")):
        with pytest.raises(ConfigError) as caught:
            check_values(value, "model")
        assert caught.value.path == path


def test_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file, other = tmp_path / "model.yaml", tmp_path / "other.yaml"
    file.write_text("x" * MAX_BYTES)
    assert len(read_plain(file, "model.file")) == MAX_BYTES
    file.write_text("x" * (MAX_BYTES + 1))
    other.write_bytes(b"\xff\xfe")
    for wrong in (file, other, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError) as caught:
            read_plain(wrong, "model.file")
        assert caught.value.path == "model.file"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a /dev/shm")
def test_file_in_shared_memory_is_read() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (Path(folder) / "model.yaml").write_text("a: 1")
        assert read_plain(Path(folder) / "model.yaml", "model.file") == "a: 1"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs a /proc")
def test_link_that_changes_once_it_is_opened_leads_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, plain, opening = tmp_path / "link", tmp_path / "plain", os.open
    plain.write_text("a: 1")
    link.symlink_to("/proc/self/environ")

    def swapped(path: Any, flags: int) -> int:
        descriptor = opening(path, flags)
        link.unlink()
        link.symlink_to(plain)
        return descriptor

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(ConfigError, match="no file on a disk"):
        read_plain(link, "model.file")
