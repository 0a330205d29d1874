"""Problems of reasoning-gym as a corpus, judged by their own verifiers (extra ``alignment``)."""

from __future__ import annotations

import pytest

from blockwright import registry
from blockwright.plugins.alignment.data.reasoning_gym import ReasoningGym
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.data.conversations import Conversation

pytest.importorskip("reasoning_gym")


def test_problems_repeat_and_are_judged_by_their_verifier() -> None:
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
    right = reward([], [f" {each.messages[1]['content']}\n" for each in every], **columns)
    assert right == [1.0] * 4
    assert max(reward([], ["no idea"] * 4, **columns)) < 0.1
    other = next(iter(ReasoningGym(["countdown"], settings=settings).conversations("test")))
    numbers = other.columns["answer"]
    swapped = {name: [other.columns[name]] for name in other.columns}
    assert reward([], [f"({numbers})"], **swapped) == [1.0]  # any expression, not the given text alone


def test_other_salts_and_settings_are_other_problems() -> None:
    def first(**changes: object) -> str:
        return next(iter(ReasoningGym(["chain_sum"], **changes).conversations("train"))).messages[0]["content"]  # type: ignore[arg-type]

    assert first() == first() != first(salt=1)
    assert ReasoningGym(["chain_sum"]).fingerprint() != ReasoningGym(["chain_sum"], salt=1).fingerprint()


def test_unknown_tasks_and_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such task") as refusal:
        ReasoningGym(["chain_sums"])
    assert "chain_sum" in str(refusal.value)
    with pytest.raises(ConfigError, match="does not take these settings"):
        ReasoningGym(["chain_sum"], settings={"chain_sum": {"terms": 3}})
