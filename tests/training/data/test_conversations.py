"""Conversations: records that are read or refused, and the rows of annotated tokens that are made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from blockwright.registry.errors import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.data.chat.formats import Plain
from blockwright.training.data.conversations import Conversation, ConversationCorpus, Conversations, read_record
from blockwright.training.data.corpus import Split
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.rows import Rendering, RowOrder
from blockwright.training.data.tokenizers.tokenizer import Bytes
from tests import built

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "3", "name": "f"}


def test_tools_and_their_messages() -> None:
    schema = [{"type": "function", "function": {"name": "f"}}]
    for tools in (schema, json.dumps(schema)):
        found = read_record({"messages": [USER, CALLS, RESULT, ANSWER], "tools": tools, "n": 1}, "f:1")
        assert found.messages == [USER, {**CALLS, "content": ""}, RESULT, ANSWER]
        assert found.tools == schema and found.columns == {"n": 1}


def test_forms_of_records() -> None:
    unscored = {**USER, "scored": False}
    assert read_record({"messages": [USER, ANSWER], "level": 3}, "f:1").columns == {"level": 3}
    assert read_record({"prompt": "Hi", "completion": "Hello"}, "f:1").messages == [unscored, ANSWER]
    assert read_record({"prompt": [USER], "completion": [ANSWER]}, "f:1").messages == [unscored, ANSWER]


REFUSED: list[Any] = [
    [], {}, {"prompt": "Hi"}, {"messages": []}, {"messages": "Hi"}, {"messages": ["Hi"]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "oracle", "content": ""}]}, {"messages": [{"role": ["user"], "content": ""}]},
    {"messages": [USER, {"role": "assistant", "content": ""}]},
    {"messages": [USER, {"role": "system", "content": "x"}]}, {"prompt": 7, "completion": "x"},
    {"prompt": "x", "completion": ""}, {"messages": [USER, {**ANSWER, "scored": "false"}]},
    {"messages": [USER, RESULT]}, {"messages": [USER, {**CALLS, "tool_calls": "f()"}]},
    {"messages": [USER, {"role": "assistant", "content": "4", "reasoning": ["2"]}]},
    {"messages": [USER, ANSWER], "tools": "[oops"}, {"messages": [USER, ANSWER], "tools": [3]},
]  # fmt: skip


@pytest.mark.parametrize("record", REFUSED)
def test_records_of_another_form_are_refused(record: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_record(record, "chats.jsonl:7")
    assert refusal.value.value == "chats.jsonl:7"


def jsonl(path: Path, n: int = 40, **columns: Any) -> Path:
    lines = [json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i), **columns}) for i in range(n)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_splits_hold_every_conversation_once(tmp_path: Path) -> None:
    corpus = Conversations(str(jsonl(tmp_path / "a.jsonl")), 0.1, 0.1)
    found = [[c.where for c in corpus.conversations(split)] for split in ("train", "val", "test")]
    assert [len(part) for part in found] == [32, 4, 4] and len({where for part in found for where in part}) == 40
    other = Conversations(str(jsonl(tmp_path / "b.jsonl", 41)), 0.1, 0.1)
    assert corpus.fingerprint() != other.fingerprint()


def test_broken_line_too_few_to_hold_out_and_none_at_all_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(ConfigError) as refusal:
        Conversations(str(path)).check()
    assert refusal.value.value == "a.jsonl:42"
    with pytest.raises(ConfigError, match="only 5 conversations"):
        list(Conversations(str(jsonl(tmp_path / "a.jsonl", 5))).conversations("train"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no conversation"):
        Conversations(str(tmp_path / "b.jsonl")).check()


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", level=2).read_text().split("\n")[:-2]
    pyarrow.parquet.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), tmp_path / "a.parquet")
    ours, theirs = (list(Conversations(str(tmp_path / f"a.{e}")).conversations("train")) for e in ("jsonl", "parquet"))
    assert [(c.messages, c.columns) for c in ours] == [(c.messages, c.columns) for c in theirs]


WHEN = datetime(2020, 1, 2, 3, 4, 5)
COLUMNS: dict[str, tuple[Any, Any]] = {  # of a type that JSON lacks → what is read of it
    "timestamps": ([WHEN], "2020-01-02T03:04:05"),
    "timestamps with a zone": (pa.array([WHEN], pa.timestamp("us", tz="UTC")), "2020-01-02T03:04:05+00:00"),
    "nanoseconds": (pa.array([1234567890123456789], pa.timestamp("ns")), "2009-02-13T23:31:30.123456789"),
    "dates": ([WHEN.date()], "2020-01-02"),
    "times": ([WHEN.time()], "03:04:05"),
    "durations": (pa.array([90_000], pa.duration("ms")), "0:01:30"),
    "decimals": ([Decimal("1.250")], "1.250"),
    "nested": ([{"a": [{"b": WHEN}]}], {"a": [{"b": "2020-01-02T03:04:05"}]}),
    "maps": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())), [["a", 1]]),
    "a dictionary": (pa.array(["a"]).dictionary_encode(), "a"),
    "large strings": (pa.array(["a"], pa.large_string()), "a"),
}


def parquet(folder: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pa.table({"messages": [[USER, ANSWER]], **columns}), folder / "x.parquet")
    return folder / "x.parquet"


def read(file: Path) -> Any:
    corpus = Conversations(str(file), val_fraction=0, test_fraction=0)
    corpus.check()
    return json.loads(next(corpus.documents("train")))


def test_columns_of_every_type_are_read_as_plain_data_and_nulls_are_none(tmp_path: Path) -> None:
    found = read(parquet(tmp_path, **{name: values for name, (values, _) in COLUMNS.items()}))["columns"]
    assert found == {name: expected for name, (_, expected) in COLUMNS.items()}
    assert read(parquet(tmp_path, a=pa.nulls(1), b=pa.array([None], pa.string())))["columns"] == {}


def _empty(folder: Path) -> Path:
    file = parquet(folder)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, 0), file)
    return file


def _spoilt(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = parquet(folder)
        file.write_bytes(change(file.read_bytes()))
        return file

    return make


UNREADABLE: dict[str, Callable[[Path], Path]] = {
    "bytes": lambda folder: parquet(folder, own=[b"ab"]),
    "bytes in a struct": lambda folder: parquet(folder, own=[{"a": b"ab"}]),
    "pictures in the record": lambda folder: parquet(folder, images=[[{"bytes": b"ab"}]]),
    "truncated": _spoilt(lambda held: held[: len(held) // 2]),
    "overwritten": _spoilt(lambda held: held[:20] + b"\xff" * 99 + held[119:]),
    "of no bytes": _spoilt(lambda held: b""),
    "not Parquet": _spoilt(lambda held: b'{"messages": []}'),
    "without rows": _empty,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read_are_refused_in_one_message(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(UNREADABLE[name](tmp_path))
    assert refusal.value.path == "data.corpus.files" and str(refusal.value).count("data.corpus.files") == 1


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


def test_prompts_of_the_same_conversations_have_another_cache(module, tmp_path):
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
        "tokenizer": {"_target_": "blockwright.training.data.tokenizers.tokenizer.Bytes"},
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
