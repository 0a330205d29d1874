"""Preferences: the forms of records, pairs as annotated tokens, and batches in which both answers are scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockwright.plugins.alignment.data.preference_module import PreferenceDataModule
from blockwright.plugins.alignment.data.preferences import PairRendering, Preferences, read_preference
from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.plain import Plain
from blockwright.training.data.tokenizers.bytes import Bytes
from tests import built

USER = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": colour} for colour in ("Blue", "Green"))
ASKED = [{**USER, "scored": False}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Sky?", "chosen": "Blue", "rejected": "Green"},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    ],
)
def test_forms_of_records(record: Any) -> None:
    found = read_preference({**record, "level": 3}, "f:1")
    assert found.messages == [*ASKED, BLUE] and found.rejected == [*ASKED, GREEN] and found.columns == {"level": 3}
    assert type(found).from_json(found.to_json()) == found


def test_prompt_that_two_texts_begin_with_ends_at_a_word() -> None:
    found = read_preference({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "f:1")
    assert [m["content"] for m in found.messages] == ["The sky is", " blue."]
    assert found.rejected[-1]["content"] == " black." and found.messages[0]["scored"] is False


def test_earlier_answers_of_the_prompt_are_not_scored() -> None:
    talk = [USER, BLUE, USER]
    found = read_preference({"chosen": [*talk, BLUE, USER, BLUE], "rejected": [*talk, GREEN]}, "f:1")
    assert [m.get("scored", True) for m in found.messages] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ([], "has list"),
        ({"prompt": "x", "chosen": "y"}, "needs chosen and rejected"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "nothing is preferred"),
        ({"prompt": "x", "chosen": "", "rejected": "y"}, "an answer is empty"),
        ({"chosen": "yes", "rejected": "no"}, "share no prompt"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "share no prompt"),
        ({"chosen": [USER, BLUE], "rejected": [USER]}, "rejected must continue the prompt"),
        ({"prompt": "x", "chosen": [USER], "rejected": [BLUE]}, "chosen must continue the prompt"),
        ({"prompt": "x", "chosen": [BLUE], "rejected": 3}, "rejected must be a list of messages or a text"),
        ({"chosen": [USER, BLUE], "rejected": "Sky? Green"}, "rejected must be a list of messages"),
    ],
)
def test_records_of_another_form_are_refused(record: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as refusal:
        read_preference(record, "pairs.jsonl:7")
    assert refusal.value.value == "pairs.jsonl:7" and refusal.value.path == "data.corpus.files"


def record(i: int) -> dict[str, str]:
    return {"prompt": f"{'q' * (i % 4 + 1)}?", "chosen": "y" * (i % 3 + 1), "rejected": f"n{i}" + "o" * (i % 5)}


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., PreferenceDataModule]:
    def make(n: int = 30, **changes: Any) -> PreferenceDataModule:
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(json.dumps(record(i)) for i in range(n)))
        given = {"tokenizer": Bytes(), "sequence_length": 12, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        made = built.data("preferences", corpus=Preferences(str(file), 0.2, 0.1), **{**given, **changes})
        made.prepare_data()
        made.setup()
        return made

    return make


def test_pictures_are_refused_and_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**record(0), "images": ["a.png"]}) + "\n")
    with pytest.raises(ConfigError, match=r"it has images, which no task on pairs reads"):
        Preferences(str(tmp_path / "pairs.jsonl"), 0.0, 0.0).check()


def test_batches_hold_both_answers_of_every_pair(module: Callable[..., PreferenceDataModule]) -> None:
    data = module(sequence_length=10)
    texts, corpus = {}, list(data.corpus.conversations("train"))
    rendering = PairRendering(Bytes(), Plain(), 10)
    kept = [each for each in corpus if len(rendering.encode(each.to_json()))]
    assert 0 < len(kept) < len(corpus) and rendering.counts["dropped"] == len(corpus) - len(kept)
    batches = list(data.every("train"))
    for batch in batches:
        n = len(batch["pair"])
        assert batch["tokens"].shape == batch["sequence"].shape and batch["targets"].shape == batch["segments"].shape
        assert ((batch["sequence"] >= 0) == (batch["targets"] >= 0)).all()
        for number in range(2 * n):
            mine = batch["sequence"] == number
            pair, side = int(batch["pair"][number % n]), "chosen" if number < n else "rejected"
            assert (
                len({(int(r), int(s)) for r, s in zip(mine.nonzero()[:, 0], batch["segments"][mine], strict=True)}) == 1
            )
            texts[pair, side] = data.tokenizer.decode(batch["targets"][mine].numpy())
            row = int(mine.nonzero()[0, 0])
            document = batch["segments"][row] == batch["segments"][mine][0]
            prompt = kept[pair].messages[0]["content"]
            assert data.tokenizer.decode(batch["tokens"][row][document].numpy()) == prompt + texts[pair, side]
    expected = {(i, side): m[-1]["content"] for i, each in enumerate(kept) for side, m in each_side(each)}
    assert texts == expected and data.number("train") == len(kept)


def test_tokens_are_those_of_the_tokenizer(module: Callable[..., PreferenceDataModule]) -> None:
    """For what measures the text of a run: without marks of what is scored, and without separators of its own."""
    data = module(sequence_length=20)
    tokens, first = data.tokens("val"), next(iter(data.corpus.conversations("val")))
    asked, said, other = (first.messages[0]["content"], *(m[-1]["content"] for _, m in each_side(first)))
    assert tokens.max() == Bytes().eos
    expected = [*(asked + said).encode(), Bytes().eos, Bytes().eos, *(asked + other).encode()]
    assert tokens[: len(expected)].tolist() == expected


def each_side(pair: Any) -> list[tuple[str, Any]]:
    return [("chosen", pair.messages), ("rejected", pair.rejected)]


def test_batch_without_a_pair_is_one_row_of_padding(module: Callable[..., PreferenceDataModule]) -> None:
    batch = module()._packed("val", 12).__getitems__([-1, -1])
    assert batch["tokens"].shape == (1, 2) and not len(batch["pair"]) and (batch["sequence"] == -1).all()


def test_splits_keep_pairs_together_and_the_order_is_seeded(module: Callable[..., PreferenceDataModule]) -> None:
    data = module(sequence_length=20)
    sizes = [data.number(split) for split in ("train", "val", "test")]
    assert sizes == [21, 6, 3]
    order = data.order.epoch(0)
    assert order.shape == (5, 4) and len(set(order.ravel().tolist())) == 20
    assert not np.array_equal(order, data.order.epoch(1))


def test_nothing_fits_and_a_corpus_without_rejected_answers(module: Callable[..., PreferenceDataModule]) -> None:
    with pytest.raises(ConfigError, match="no pair of the train split fits"):
        module(sequence_length=2)
    chat = {"where": "f:1", "messages": [USER, BLUE], "columns": {}, "tools": []}
    with pytest.raises(ConfigError, match="without a rejected answer"):
        PairRendering(Bytes(), Plain(), 12).check([json.dumps(chat)])
