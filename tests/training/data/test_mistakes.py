"""The checks before a run: each mistake in the data is one error at its path, in a moment; and the YAML composes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairwise import each

from blockwright.registry.errors import ConfigError
from blockwright.training.configuration import parts

CONF = Path(__file__).parents[3] / "conf"
CHARS = {"_target_": "blockwright.training.data.tokenizers.chars.Chars", "vocab_size": 5}
NUMBERS: list[tuple[str, Any]] = [
    *(("sequence_length", value) for value in (1, None, 2.5, "256")),
    *(("batch_size", 0), ("batch_size", True), ("eval_batch_size", 0), ("eval_windows", 0)),
    *(("num_workers", -1), ("seed", -1)),
]
# Path of the value → the value
OTHERS: list[tuple[str, Any]] = [
    ("batchsize", 4),
    ("corpus.separater", "x"),
    ("corpus.files", "???"),
    ("corpus.files", "TMP/b.txt"),
    ("corpus.val_fraction", 1.5),
    ("tokenizer.vocab_size", 256),
    ("name", "txet"),
    *each(
        ["corpus", "tokenizer"],
        [None, "x", {}, {"_target_": "blockwright.training.data.nowhere.Corpus"}, {"_target_": "pathlib.Path"}],
    ),
]


@pytest.fixture
def node(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("a line of text\n" * 200)
    return {
        "name": "text",
        "corpus": {"_target_": "blockwright.training.data.text.TextFiles", "files": f"{tmp_path}/a.txt"},
        "tokenizer": {"_target_": "blockwright.training.data.tokenizers.bytes.Bytes", "vocab_size": 257},
        "sequence_length": 32,
        "batch_size": 4,
        "eval_batch_size": None,
        "eval_windows": None,
        "num_workers": 0,
        "seed": 0,
        "cache_dir": f"{tmp_path}/cache",
    }


def check(node: dict[str, Any]) -> None:
    parts.build("data", {"data": node}).check()


def refused_at(node: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(node)
    assert caught.value.remedy
    return caught.value.path


@pytest.mark.parametrize(("path", "value"), [*NUMBERS, *OTHERS])
def test_a_mistake_is_refused_by_its_path(node: dict[str, Any], tmp_path: Path, path: str, value: Any) -> None:
    wrong = copy.deepcopy(node)
    *around, last = path.split(".")
    (wrong[around[0]] if around else wrong)[last] = (
        value.replace("TMP", str(tmp_path)) if value == "TMP/b.txt" else value
    )
    assert refused_at(wrong) in (f"data.{path}", f"data.{path}._target_")


def test_a_missing_value_a_small_vocabulary_and_a_class_in_place_of_a_name_are_refused(node: dict[str, Any]) -> None:
    assert refused_at({**node, "tokenizer": CHARS}) == "data.tokenizer.vocab_size"
    del node["corpus"]["files"]
    assert refused_at(node) == "data.corpus.files"
    assert refused_at({"_target_": "their.DataModule", "rows": 3}) == "data._target_"


def composed(*overrides: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(overrides=["+seed=3", "+paths.data_dir=/data", *overrides])
    return OmegaConf.to_container(config.data, resolve=True)


def test_text_asks_for_its_files(tmp_path: Path) -> None:
    assert refused_at(composed("+data=text")) == "data.corpus.files"
    (tmp_path / "a.txt").write_text("a line of text\n" * 2000)
    check(composed("+data=text", f"data.corpus.files={tmp_path}/a.txt", "data.corpus.val_fraction=0.1"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]  # checking leaves nothing on disk
