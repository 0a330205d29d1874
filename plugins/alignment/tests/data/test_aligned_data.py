"""Data of post-training: pairs of answers and their batches, problems of reasoning-gym, keys of caches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockwright import registry
from blockwright.lab import data
from blockwright.plugins.alignment.data.preferences import (
    PairRendering,
    PreferenceDataModule,
    Preferences,
    SortingPreferences,
    read_preference,
)
from blockwright.plugins.alignment.data.reasoning_gym import ReasoningGym
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.data.chat.formats import Plain
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.tokenizers.tokenizer import Bytes
from tests import built
from tests.training.data.test_fingerprint import DRAWN, ROOM, SMALL, assert_documents_apart, talks, turns

USER = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": colour} for colour in ("Blue", "Green"))
FORMS: list[dict[str, Any]] = [
    {"prompt": "Sky?", "chosen": "Blue", "rejected": "Green"},
    {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
    {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    {"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
]
BAD: list[Any] = [
    [],
    {"prompt": "x", "chosen": "y"},
    {"prompt": "x", "chosen": "y", "rejected": "y"},
    {"prompt": "x", "chosen": "", "rejected": "y"},
    {"chosen": "yes", "rejected": "no"},  # share no prompt
    {"chosen": [BLUE], "rejected": [GREEN]},
    {"chosen": [USER, BLUE], "rejected": [USER]},
    {"prompt": "x", "chosen": [USER], "rejected": [BLUE]},
    {"prompt": "x", "chosen": [BLUE], "rejected": 3},
    {"chosen": [USER, BLUE], "rejected": "Sky? Green"},
]


def test_forms_of_records() -> None:
    asked = [{**USER, "scored": False}]
    for record in FORMS:
        found = read_preference({**record, "level": 3}, "f:1")
        assert found.messages == [*asked, BLUE] and found.rejected == [*asked, GREEN] and found.columns == {"level": 3}
        assert type(found).from_json(found.to_json()) == found
    found = read_preference({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "f:1")  # ends at a word
    assert [m["content"] for m in found.messages] == ["The sky is", " blue."]
    assert found.rejected[-1]["content"] == " black." and found.messages[0]["scored"] is False
    talk = [USER, BLUE, USER]
    found = read_preference({"chosen": [*talk, BLUE, USER, BLUE], "rejected": [*talk, GREEN]}, "f:1")
    assert [m.get("scored", True) for m in found.messages] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("record", BAD, ids=str)
def test_records_of_another_form_are_refused(record: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_preference(record, "pairs.jsonl:7")
    assert refusal.value.value == "pairs.jsonl:7" and refusal.value.path == "data.corpus.files"


def record(i: int) -> dict[str, str]:
    return {"prompt": f"{'q' * (i % 4 + 1)}?", "chosen": "y" * (i % 3 + 1), "rejected": f"n{i}" + "o" * (i % 5)}


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., PreferenceDataModule]:
    def make(sequence_length: int) -> PreferenceDataModule:
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(json.dumps(record(i)) for i in range(30)))
        given = {"sequence_length": sequence_length, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        made = built.data("preferences", corpus=Preferences(str(file), 0.2, 0.1), tokenizer=Bytes(), **given)
        made.prepare_data()
        made.setup()
        return made

    return make


def sides(pair: Any) -> list[tuple[str, Any]]:
    return [("chosen", pair.messages), ("rejected", pair.rejected)]


def test_batches_hold_both_answers_of_every_pair(module: Callable[..., PreferenceDataModule]) -> None:
    data = module(10)
    texts, corpus = {}, list(data.corpus.conversations("train"))
    rendering = PairRendering(Bytes(), Plain(), 10)
    kept = [each for each in corpus if len(rendering.encode(each.to_json()))]
    assert 0 < len(kept) < len(corpus) and rendering.counts["dropped"] == len(corpus) - len(kept)
    for batch in data.every("train"):
        n = len(batch["pair"])
        assert batch["tokens"].shape == batch["sequence"].shape and batch["targets"].shape == batch["segments"].shape
        assert ((batch["sequence"] >= 0) == (batch["targets"] >= 0)).all()
        for number in range(2 * n):
            mine = batch["sequence"] == number
            pair, side = int(batch["pair"][number % n]), "chosen" if number < n else "rejected"
            (row,) = set(mine.nonzero()[:, 0].tolist())
            (segment,) = set(batch["segments"][mine].tolist())
            texts[pair, side] = data.tokenizer.decode(batch["targets"][mine].numpy())
            document = batch["segments"][row] == segment
            prompt = kept[pair].messages[0]["content"]
            assert data.tokenizer.decode(batch["tokens"][row][document].numpy()) == prompt + texts[pair, side]
    assert texts == {(i, side): m[-1]["content"] for i, each in enumerate(kept) for side, m in sides(each)}
    assert data.number("train") == len(kept)
    batch = data._packed("val", 12).__getitems__([-1, -1])  # without a pair: one row of padding
    assert batch["tokens"].shape == (1, 2) and not len(batch["pair"]) and (batch["sequence"] == -1).all()


def test_tokens_splits_and_order(module: Callable[..., PreferenceDataModule]) -> None:
    """Tokens without marks of what is scored, for what measures the text of a run; pairs together in a split."""
    data = module(20)
    tokens, first = data.tokens("val"), next(iter(data.corpus.conversations("val")))
    asked, said, other = (first.messages[0]["content"], *(m[-1]["content"] for _, m in sides(first)))
    assert tokens.max() == Bytes().eos
    expected = [*(asked + said).encode(), Bytes().eos, Bytes().eos, *(asked + other).encode()]
    assert tokens[: len(expected)].tolist() == expected
    assert [data.number(split) for split in ("train", "val", "test")] == [21, 6, 3]
    order = data.order.epoch(0)
    assert order.shape == (5, 4) and len(set(order.ravel().tolist())) == 20
    assert not np.array_equal(order, data.order.epoch(1))


def test_pairs_that_cannot_be_trained_on_are_refused(
    module: Callable[..., PreferenceDataModule], tmp_path: Path
) -> None:
    chat = {"where": "f:1", "messages": [USER, BLUE], "columns": {}, "tools": []}
    (tmp_path / "seen.jsonl").write_text(json.dumps({**record(0), "images": ["a.png"]}) + "\n")
    for path, act in (
        ("data.sequence_length", lambda: module(2)),  # none fits
        ("data.corpus", lambda: PairRendering(Bytes(), Plain(), 12).check([json.dumps(chat)])),  # no rejected answer
        ("data.corpus.files", Preferences(str(tmp_path / "seen.jsonl"), 0.0, 0.0).check),  # pictures
    ):
        with pytest.raises(ConfigError) as refusal:
            act()
        assert refusal.value.path == path


def test_problems_repeat_and_are_judged_by_their_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    settings = {"chain_sum": {"max_terms": 3}, "countdown": {"min_numbers": 3, "max_numbers": 3}}
    corpus = ReasoningGym(["chain_sum", "countdown"], train=6, held_out=4, settings=settings)
    found = {split: list(corpus.conversations(split)) for split in ("train", "val", "test")}
    assert found["train"] == list(corpus.conversations("train"))
    assert [len(found[split]) for split in ("val", "test")] == [4, 4]
    asked = {split: {each.messages[0]["content"] for each in every} for split, every in found.items()}
    assert not asked["train"] & (asked["val"] | asked["test"]) and not asked["val"] & asked["test"]
    every = [Conversation.from_json(each.to_json()) for each in found["val"]]
    assert [each.columns["task"] for each in every] == ["chain_sum", "countdown"] * 2
    reward = registry.build("reward", Node("reasoning_gym", "task.reward"), Scope({}, {}))
    columns = {name: [each.columns[name] for each in every] for name in every[0].columns}
    assert reward([], [f" {each.messages[1]['content']}\n" for each in every], **columns) == [1.0] * 4
    assert max(reward([], ["no idea"] * 4, **columns)) < 0.1
    other = next(iter(ReasoningGym(["countdown"], settings=settings).conversations("test")))
    swapped = {name: [other.columns[name]] for name in other.columns}
    assert reward([], [f"({other.columns['answer']})"], **swapped) == [1.0]  # any expression, not the given text alone
    for given in ({"tasks": ["chain_sums"]}, {"tasks": ["chain_sum"], "settings": {"chain_sum": {"terms": 3}}}):
        with pytest.raises(ConfigError):
            ReasoningGym(**given)  # type: ignore[arg-type]


def test_corpora_of_other_settings_have_another_key(tmp_path: Path) -> None:
    never = [{"role": "assistant", "content": "Never."}]
    for name in ("a", "b"):
        pairs = [{"prompt": turns(t)[:1], "chosen": turns(t)[1:], "rejected": never} for t in talks(name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    files = [{"files": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    assert_documents_apart(Preferences, files[0], {**files[1], **ROOM})
    assert_documents_apart(SortingPreferences, SMALL, {**DRAWN, "shortest": 3, "longest": 9, "falling": 0.1})


def test_problems_of_other_settings_have_another_key() -> None:
    pytest.importorskip("reasoning_gym")
    other = {**DRAWN, "tasks": ["basic_arithmetic"], "settings": {"chain_sum": {"min_terms": 5, "max_terms": 6}}}
    assert_documents_apart(ReasoningGym, {"tasks": ["chain_sum"], **SMALL}, other)


@pytest.mark.parametrize("option", ["sorting_preferences", "sorting_prompts"])
def test_samples_are_shown_without_the_marks_that_lie_beside_tokens_on_disk(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.corpus.train=60", "data.corpus.held_out=20", "trainer.max_steps=2", f"paths.data_dir={tmp_path}"]
    assert data.main([f"data={option}", *small]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert all(0.8 < float(line.split()[3]) < 0.95 for line in lines[:3])  # a digit or = is one byte, an end none
    assert all(re.fullmatch(r"[a-z]+: '\d*(=\d{5,})+=?\d*'", line) for line in lines[3:]), lines
