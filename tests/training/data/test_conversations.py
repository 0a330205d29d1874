"""Records of conversations: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from blockwright.registry.errors import ConfigError
from blockwright.training.data.conversations import Conversations, read_record

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
    [],
    {},
    {"prompt": "Hi"},
    {"messages": []},
    {"messages": "Hi"},
    {"messages": ["Hi"]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "oracle", "content": ""}]},
    {"messages": [{"role": ["user"], "content": ""}]},
    {"messages": [USER, {"role": "assistant", "content": ""}]},
    {"messages": [USER, {"role": "system", "content": "x"}]},
    {"prompt": 7, "completion": "x"},
    {"prompt": "x", "completion": ""},
    {"messages": [USER, {**ANSWER, "scored": "false"}]},
    {"messages": [USER, RESULT]},
    {"messages": [USER, {**CALLS, "tool_calls": "f()"}]},
    {"messages": [USER, {"role": "assistant", "content": "4", "reasoning": ["2"]}]},
    {"messages": [USER, ANSWER], "tools": "[oops"},
    {"messages": [USER, ANSWER], "tools": [3]},
]


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


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bytes": (lambda folder: parquet(folder, own=[b"ab"]), "x.parquet:1': the column own holds bytes"),
    "bytes in a struct": (lambda folder: parquet(folder, own=[{"a": b"ab"}]), "x.parquet:1': the column own holds"),
    "pictures in the record": (lambda folder: parquet(folder, images=[[{"bytes": b"ab"}]]), "it has images"),
    "truncated": (_spoilt(lambda held: held[: len(held) // 2]), "x.parquet': cannot be read as Parquet"),
    "overwritten": (_spoilt(lambda held: held[:20] + b"\xff" * 99 + held[119:]), "cannot be read as Parquet"),
    "of no bytes": (_spoilt(lambda held: b""), "cannot be read as Parquet"),
    "not Parquet": (_spoilt(lambda held: b'{"messages": []}'), "cannot be read as Parquet"),
    "without rows": (_empty, "the files hold no conversation"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read_are_refused_in_one_message(tmp_path: Path, name: str) -> None:
    make, rule = UNREADABLE[name]
    with pytest.raises(ConfigError) as refusal:
        read(make(tmp_path))
    assert refusal.value.path == "data.corpus.files" and rule in str(refusal.value)
    assert str(refusal.value).count("data.corpus.files") == 1
