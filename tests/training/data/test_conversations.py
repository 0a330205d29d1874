"""Records of conversations: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import ConfigError
from training.data.conversations import Conversations, read_record

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


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ([], "must be a mapping, not list"),
        ({}, "needs messages, or prompt and completion"),
        ({"prompt": "Hi"}, "this has prompt"),
        ({"messages": []}, "not empty"),
        ({"messages": "Hi"}, "must be a list"),
        ({"messages": ["Hi"]}, "needs a role and a content"),
        ({"messages": [{"role": "user"}]}, "needs a role and a content"),
        ({"messages": [{"role": "user", "content": 3}]}, "both text"),
        ({"messages": [{"role": "oracle", "content": ""}]}, "'oracle' is none of"),
        ({"messages": [{"role": ["user"], "content": ""}]}, "is none of"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "an answer is empty"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "must be the first"),
        ({"prompt": 7, "completion": "x"}, "must be a list of messages or a text"),
        ({"prompt": "x", "completion": ""}, "an answer is empty"),
        ({"messages": [USER, {**ANSWER, "scored": "false"}]}, "scored must be true or false: 'false'"),
        ({"messages": [USER, RESULT]}, "must follow an answer with tool_calls"),
        ({"messages": [USER, {**CALLS, "tool_calls": "f()"}]}, "tool_calls must be a list of mappings"),
        ({"messages": [USER, ANSWER], "tools": "[oops"}, "tools is no JSON"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "must be a list of JSON schemas"),
    ],
)
def test_records_of_another_form_are_refused(record: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as refusal:
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


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(ConfigError, match="no line of JSON") as refusal:
        Conversations(str(path)).check()
    assert refusal.value.value == "a.jsonl:42"


def test_too_few_to_hold_out_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only 5 conversations"):
        list(Conversations(str(jsonl(tmp_path / "a.jsonl", 5))).conversations("train"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no conversation"):
        Conversations(str(tmp_path / "b.jsonl")).check()


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    lines = jsonl(tmp_path / "a.jsonl", level=2).read_text().split("\n")[:-2]
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), tmp_path / "a.parquet")
    ours, theirs = (list(Conversations(str(tmp_path / f"a.{e}")).conversations("train")) for e in ("jsonl", "parquet"))
    assert [(c.messages, c.columns) for c in ours] == [(c.messages, c.columns) for c in theirs]
