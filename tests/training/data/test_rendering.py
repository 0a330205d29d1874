"""Conversations as annotated tokens: shortening, refusals, packing into rows, batches, resuming, the masked loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.registry.errors import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.data.chat.plain import Plain
from blockwright.training.data.conversations import Conversation, ConversationCorpus
from blockwright.training.data.corpus import Split
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.rendering import Rendering
from blockwright.training.data.rows import RowOrder
from blockwright.training.data.tokenizers.bytes import Bytes
from tests import built


def talk(*contents: str, where: str = "f:1") -> Conversation:
    roles = ("user", "assistant")
    return Conversation(where, [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)])


class Talks(ConversationCorpus):
    def __init__(self, train: list[Conversation], val: list[Conversation] | None = None) -> None:
        self.talks: dict[Split, list[Conversation]] = {"train": train, "val": val or [], "test": []}

    def conversations(self, split: Split) -> Iterator[Conversation]:
        return iter(self.talks[split])

    def check(self) -> None: ...

    def is_small(self) -> bool:
        return True

    def fingerprint(self) -> str:
        return json.dumps([[c.to_json() for c in part] for part in self.talks.values()])


MANY = [talk(f"q{'u' * (i % 5)}", f"a{'n' * (i % 7)}", "more?", "yes" * (i % 3 + 1)) for i in range(40)]


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., ChatDataModule]:
    def make(train: list[Conversation] = MANY, **changes: Any) -> ChatDataModule:
        given = {"tokenizer": Bytes(), "sequence_length": 48, "batch_size": 3, "cache_dir": str(tmp_path / "cache")}
        made = built.data("chat", corpus=Talks(train, train[:7]), **{**given, **changes})
        made.prepare_data()
        made.setup()
        return made

    return make


def test_long_conversation_loses_whole_turns_and_is_counted() -> None:
    rendering = Rendering(Bytes(), Plain(), 12)
    kept = rendering.encode(talk("abc", "de", "fgh", "ijklm").to_json())
    assert rendering.decode(kept) == "abcde" and (kept % 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(rendering.encode(talk("abc", "d" * 20).to_json())) == 0
    assert rendering.encode(talk("abc", "de", "fg", "hi").to_json()).size == 11
    assert dict(rendering.counts) == {"conversations": 3, "shortened": 1, "dropped": 1}


def test_conversation_without_a_scored_token_is_refused_by_file_and_line() -> None:
    rendering, unscored = Rendering(Bytes(), Plain(), 12), talk("abc", where="chats.jsonl:9").to_json()
    for act in (rendering.encode, lambda text: rendering.check([text])):
        with pytest.raises(ConfigError, match="no scored token") as refusal:
            act(unscored)
        assert refusal.value.value == "chats.jsonl:9"


def test_batches_hold_whole_conversations(module: Callable[..., ChatDataModule]) -> None:
    found = []
    for batch in _epoch(module()):
        assert batch["tokens"].shape == batch["positions"].shape == (3, 48)
        for tokens, targets, segments, positions in zip(
            *(batch[k] for k in ("tokens", "targets", "segments", "positions")), strict=True
        ):
            for number in segments.unique():
                at = segments == number
                assert positions[at].tolist() == list(range(int(at.sum())))
                if (targets[at] >= 0).any():
                    found.append(Bytes().decode(tokens[at]))
                    scored = targets[at] >= 0
                    assert (tokens[at][1:][scored[:-1]] == targets[at][scored]).all() and not scored[-1]
        scored_bytes = sum(int((row[(row >= 0)] < 256).sum()) for row in batch["targets"])
        assert batch["n_bytes"].sum() == scored_bytes
    expected = ["".join(turn["content"] for turn in each.messages) for each in MANY]
    assert len(found) > 30 and all(text in expected for text in found)


def _epoch(made: ChatDataModule) -> Iterator[dict[str, torch.Tensor]]:
    loader = made.train_dataloader()
    return (batch for _, batch in zip(range(made.order.n_batches), loader, strict=False))


def test_scored_tokens_are_the_answers_with_their_ends(module: Callable[..., ChatDataModule]) -> None:
    made = module()
    batch = next(iter(made.val_dataloader()))
    scored = batch["targets"][batch["targets"] >= 0]
    answers = "".join(t["content"] for c in MANY[:7] for t in c.messages if t["role"] == "assistant")
    assert sorted(Bytes().decode(scored)) == sorted(answers) and (scored == 256).sum() == 14

    tokens = module([talk("hi", "yo")] * 20).tokens("train")
    assert tokens[:12].tolist() == [*b"hiyo", Bytes().eos, Bytes().eos] * 2


def test_order_is_a_function_of_seed_and_epoch(module: Callable[..., ChatDataModule]) -> None:
    first, again = ([b["tokens"] for b in _epoch(module())] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    order = RowOrder(10, 3, 0)
    assert order.epoch(0).shape == (3, 3) and len(set(order.epoch(0).ravel())) == 9
    assert order.epoch(0).tolist() != order.epoch(1).tolist() != RowOrder(10, 3, 1).epoch(1).tolist()


def test_prompts_of_the_same_conversations_have_another_cache(
    module: Callable[..., ChatDataModule], tmp_path: Path
) -> None:
    made = module()
    folder = str(tmp_path / "cache")
    settings = {"tokenizer": Bytes(), "sequence_length": 48, "batch_size": 3, "cache_dir": folder}
    prompts = built.data("prompts", corpus=made.corpus, **settings)
    prompts.prepare_data()
    prompts.setup()
    assert Bytes().decode(prompts.prompts("train")[0].ids) == "qamore?"  # without the last answer

    with pytest.raises(ConfigError, match="no conversation of the train split fits"):
        module([talk("long" * 20, "answer")] * 9)


def test_fine_tuning_data_is_checked_before_a_run(tmp_path: Path) -> None:
    def check(node: dict[str, Any]) -> Any:
        data = parts.build("data", {"data": node})
        data.check()
        return data

    file = tmp_path / "chats.jsonl"
    lines = [json.dumps({"prompt": f"{i}", "completion": "x"}) for i in range(20)]
    file.write_text("\n".join([*lines, json.dumps({"messages": [{"role": "user", "content": "alone"}]})]))
    node = {
        "name": "chat",
        "corpus": {"_target_": "blockwright.training.data.conversations.Conversations", "files": str(file)},
        "tokenizer": {"_target_": "blockwright.training.data.tokenizers.bytes.Bytes"},
        "chat": {"name": "plain"},
    }
    for change in ({}, {"chat": "chatmll"}, {"chat": "chatml"}, {"updates": 2}):
        with pytest.raises(ConfigError) as refusal:
            check({**node, **change})
        assert change or refusal.value.value == "chats.jsonl:21"
    file.write_text("\n".join(lines))
    assert check(node).tokenizer.vocab_size == 257


def test_masked_loss_is_the_published_one() -> None:
    golden = json.loads((Path(__file__).parent / "golden_sft.json").read_text())
    logits, tokens = torch.tensor(golden["logits"]), torch.tensor(golden["tokens"])
    targets = torch.where(torch.tensor(golden["scored"]) == 1, tokens, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(golden["mean over scored tokens"], abs=1e-6)
