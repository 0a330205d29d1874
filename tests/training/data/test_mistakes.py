"""The checks before a run: each mistake in the data is one clear error, in a moment; and the YAML composes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairwise import each

from blockwright.registry.errors import ConfigError
from blockwright.training.configuration import parts

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"


@pytest.fixture
def node(tmp_path) -> dict:
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


def check(node: dict) -> None:
    parts.build("data", {"data": node}).check()


def refusal(node: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        check(node)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_length", 1),
        ("sequence_length", None),
        ("sequence_length", 2.5),
        ("sequence_length", "256"),
        ("batch_size", 0),
        ("batch_size", True),
        ("eval_batch_size", 0),
        ("eval_windows", 0),
        ("num_workers", -1),
        ("seed", -1),
    ],
)
def test_a_number_out_of_range_is_refused(node, key, value):
    assert re.search(rf"^data\.{key} = {value!r}: must be an integer of at least", refusal({**node, key: value}))


def test_a_misspelt_key_is_refused_with_the_nearest_name(node):
    assert re.search(r"^data\.batchsize = 4: .*Did you mean 'batch_size'", refusal({**node, "batchsize": 4}))
    node["corpus"]["separater"] = "x"
    assert re.search(r"^data\.corpus\.separater = 'x': .*Did you mean 'separator'", refusal(node))


def test_a_missing_value_is_refused_by_its_path(node):
    node["corpus"]["files"] = "???"
    assert refusal(node).startswith("data.corpus.files = '???'")
    del node["corpus"]["files"]
    assert refusal(node).startswith("data.corpus.files = None")


def test_errors_of_the_corpus_come_out_as_they_are(node, tmp_path):
    node["corpus"]["files"] = f"{tmp_path}/b.txt"
    assert re.search(r"^data\.corpus\.files = .*Did you mean 'a.txt'", refusal(node))
    node["corpus"] |= {"files": f"{tmp_path}/a.txt", "val_fraction": 1.5}
    assert refusal(node).startswith("data.corpus.val_fraction = 1.5: must be a number of at least 0 and below 1")


def test_errors_of_the_tokenizer_come_out_as_they_are(node):
    node["tokenizer"]["vocab_size"] = 256
    assert refusal(node).startswith("data.tokenizer.vocab_size = 256")
    node["tokenizer"] = {"_target_": "blockwright.training.data.tokenizers.chars.Chars", "vocab_size": 5}
    assert re.search(r"^data\.tokenizer\.vocab_size = 5: .*vocab_size=13", refusal(node))


@pytest.mark.parametrize(
    ("bad", "key"),
    each(
        [None, "x", {}, {"_target_": "blockwright.training.data.nowhere.Corpus"}, {"_target_": "pathlib.Path"}],
        ["corpus", "tokenizer"],
    ),
)
def test_what_is_no_corpus_or_tokenizer_is_refused_and_not_called(node, key, bad):
    assert re.search(rf"^data\.{key}(\._target_)? = .*For example: data", refusal({**node, key: bad}))


def test_a_class_in_place_of_a_name_is_refused_with_the_way_to_register_it(node):
    assert re.search(r"^data\._target_ = .*@register", refusal({"_target_": "their.DataModule", "rows": 3}))
    assert re.search(r"^data\.name = 'txet': .*Did you mean 'text'", refusal({**node, "name": "txet"}))


# ---- the YAML


def composed(*overrides: str) -> dict:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(overrides=["+seed=3", "+paths.data_dir=/data", *overrides])
    return OmegaConf.to_container(config.data, resolve=True)


def test_text_asks_for_its_files(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.corpus\.files"):
        check(composed("+data=text"))
    (tmp_path / "a.txt").write_text("a line of text\n" * 2000)
    check(composed("+data=text", f"data.corpus.files={tmp_path}/a.txt", "data.corpus.val_fraction=0.1"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]  # checking leaves nothing on disk
