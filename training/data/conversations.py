"""Conversations as a corpus: JSON lines or Parquet, in the forms that Hugging Face's trainers take.

A record has ``messages``, a list of ``{role, content}``; or ``prompt`` and ``completion``, each a text or a list of
messages, of which the completion alone is scored. A message with ``scored: false`` is not scored. ``tools`` is a list
of JSON schemas, or JSON of one, that a format may show; an answer may have ``tool_calls``, which messages of the role
``tool`` answer, and ``reasoning_content``, its thoughts, also under the older names ``reasoning`` and ``thinking``.
Other columns are kept; tasks with rewards read them.
"""

from __future__ import annotations

import datetime
import decimal
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Self

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError, require
from blockwright.registry.ranges import BelowOne, Whole
from blockwright.training.data.corpus import (
    ENOUGH_DOCUMENTS,
    LEFT_OUT,
    QUICK_BYTES,
    SPLITS,
    Corpus,
    Split,
    assign,
    expand,
)
from blockwright.training.data.fingerprint import digest, of_file, state

ROLES = ("system", "user", "assistant", "tool")
OF_TOOLS = ("tool_calls", "tool_call_id", "name")  # keys of messages that a template may show
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message's thoughts, of which the first is read
PICTURES = ("images", "image", "picture", "pictures")  # columns of which other rules say what is wrong
FORMS = 'Write {"messages": [{"role": "user", "content": "…"}, …]} or {"prompt": "…", "completion": "…"}'


@dataclass(frozen=True)
class Conversation:
    """A conversation.

    Args:
        where: file and line, for messages
        messages: role, content and, where false, scored, of each turn; and what else a template may show
        columns: the record's other columns
        tools: JSON schemas of the tools that the model may call
    """

    where: str
    messages: list[dict[str, Any]]
    columns: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


class ConversationCorpus(Corpus):
    """Conversations in three splits. As documents they are JSON, so that everything about text works on them."""

    @abstractmethod
    def conversations(self, split: Split) -> Iterator[Conversation]:
        """The conversations of a split, always in the same order."""

    def documents(self, split: Split) -> Iterator[str]:
        return (each.to_json() for each in self.conversations(split))


@enforced("data.corpus")
class Conversations(ConversationCorpus):
    """Files of conversations.

    Args:
        files: a path or glob (``~/chats/*.jsonl``), or a list of them; ``.parquet`` is read as Parquet, all else as
            JSON lines
        val_fraction: part of the conversations to validate on, in [0, 1); 0 for no validation
        test_fraction: part of the conversations to test on, in [0, 1); 0 for no test
        split_seed: which conversations are held out; not the seed of the run
    """

    def __init__(
        self,
        files: str | list[str],
        val_fraction: BelowOne = 0.05,
        test_fraction: BelowOne = 0.05,
        split_seed: Whole = 0,
    ) -> None:
        self.files = [files] if isinstance(files, str) else [str(name) for name in files]
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        if val_fraction + test_fraction >= 1:
            rule = f"with test_fraction = {test_fraction!r} nothing is left to train on"
            raise ConfigError("data.corpus.val_fraction", val_fraction, rule, "Make the two sum to less than 1")

    def conversations(self, split: Split) -> Iterator[Conversation]:
        parts, which = self._parts, SPLITS.index(split)
        return (each for i, each in enumerate(self._all()) if parts[i] == which)

    def read(self, record: Any, where: str) -> Conversation:
        """The conversation of a record; see ``read_record``."""
        if isinstance(record, Mapping) and record.get("images"):
            refuse(
                where, "it has images, and this data is text alone", "Use data=images and a model with an image side"
            )
        return read_record(record, where)

    def check(self) -> None:
        if not self._n_records:
            raise ConfigError("data.corpus.files", self.files, "the files hold no conversation", FORMS)
        if self.is_small():
            for _ in self._all():
                pass
        else:
            next(self._all())

    def is_small(self) -> bool:
        return sum(path.stat().st_size for path in self._paths) <= QUICK_BYTES

    def fingerprint(self) -> str:
        return digest(state(self, LEFT_OUT), list(map(of_file, self._paths)))

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted({path for pattern in self.files for path in expand(pattern)})

    def _all(self) -> Iterator[Conversation]:
        return (self.read(record, where) for where, record in self._records())

    def _records(self) -> Iterator[tuple[str, Any]]:
        return (found for path in self._paths for found in self._records_of(path))

    def _records_of(self, path: Path) -> Iterator[tuple[str, Any]]:
        return _parquet(path) if path.suffix == ".parquet" else _json_lines(path)

    @cached_property
    def _n_records(self) -> int:
        return sum(1 for _ in self._records())

    @cached_property
    def _parts(self) -> Any:
        n = self._n_records
        if n < ENOUGH_DOCUMENTS and (self.val_fraction or self.test_fraction):
            rule = f"there are only {n} conversations, too few to hold any out"
            remedy = "Add more, or hold none out: data.corpus.val_fraction=0 data.corpus.test_fraction=0"
            raise ConfigError("data.corpus.val_fraction", self.val_fraction, rule, remedy)
        return assign(n, self.val_fraction, self.test_fraction, self.split_seed)


def read_record(record: Any, where: str) -> Conversation:
    """The conversation of a record.

    Args:
        record: of a file
        where: file and line

    Raises:
        ConfigError: at ``data.corpus.files``, for a record of another form, with file and line
    """
    if not isinstance(record, Mapping):
        refuse(where, f"a record must be a mapping, not {type(record).__name__}")
    if "messages" in record:
        messages = turns(record["messages"], "messages", where)
        used = {"messages"}
    elif {"prompt", "completion"} <= set(record):
        prompt = turns(record["prompt"], "prompt", where, "user")
        messages = unscored(prompt) + turns(record["completion"], "completion", where, "assistant")
        used = {"prompt", "completion"}
    else:
        refuse(where, f"a record needs messages, or prompt and completion; this has {', '.join(map(str, record))}")
    refuse_order(messages, where)
    return Conversation(
        where, messages, {k: v for k, v in record.items() if k not in {*used, "tools"}}, tools(record, where)
    )


def turns(value: Any, key: str, where: str, role: str | None = None) -> list[dict[str, Any]]:
    """The messages in a column of a record; a text is one message of ``role``, if that is given."""
    if isinstance(value, str) and role is not None:
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        refuse(where, f"{key} must be a list of messages{' or a text' if role else ''}, and not empty")
    return [_turn(turn, key, where) for turn in value]


def _turn(turn: Any, key: str, where: str) -> dict[str, Any]:
    calls = turn.get("tool_calls") if isinstance(turn, Mapping) else None
    if calls and turn.get("content") is None:
        turn = {**turn, "content": ""}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        refuse(where, f"a message of {key} needs a role and a content, both text: {str(turn)[:80]}")
    if turn.get("role") not in ROLES:
        refuse(where, f"the role {str(turn.get('role'))!r} is none of {', '.join(ROLES)}")
    if calls and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        refuse(where, f"tool_calls must be a list of mappings: {str(calls)[:80]}")
    if not isinstance(turn.get("scored"), bool | None):
        refuse(where, f"scored must be true or false: {str(turn['scored'])[:80]!r}")
    if turn["role"] == "assistant" and not turn["content"] and not calls:
        refuse(where, "an answer is empty")
    thoughts = next((turn[k] for k in REASONING if turn.get(k) is not None), None)
    if not isinstance(thoughts, str | None):
        refuse(where, f"the reasoning of a message must be a text: {str(thoughts)[:80]}")
    turn = {**turn, REASONING[0]: thoughts}
    return {k: turn[k] for k in ("role", "content", "scored", REASONING[0], *OF_TOOLS) if turn.get(k) is not None}


def unscored(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, of which none is scored."""
    return [{**turn, "scored": False} for turn in messages]


def refuse_order(messages: list[dict[str, Any]], where: str) -> None:
    """Refuse a system message after the first, and a tool's message that follows no call."""
    if any(turn["role"] == "system" for turn in messages[1:]):
        refuse(where, "a system message must be the first")
    for before, turn in pairwise([{}, *messages]):
        if turn["role"] == "tool" and not (before.get("role") == "tool" or before.get("tool_calls")):
            refuse(where, "a message of the role tool must follow an answer with tool_calls")


def tools(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The tools of a record: a list of JSON schemas, or JSON of one, since Parquet would give all schemas all keys."""
    found = record.get("tools") or []
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            refuse(where, f"tools is no JSON ({error})")
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        refuse(where, f"tools must be a list of JSON schemas: {str(found)[:80]}")
    return found


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                    if b"\\ud" in line.lower():  # halves of characters, which JSON may write alone
                        json.dumps(record, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    refuse(f"{path.name}:{number}", f"is no line of JSON ({error})")
                yield f"{path.name}:{number}", record


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    require("parquet", "pyarrow", path="data.corpus.files", value=path.name)
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                where = f"{path.name}:{number}"
                yield where, {k: _plain(v, k, where) for k, v in record.items() if v is not None}
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        rule = f"cannot be read as Parquet ({' '.join(str(error).split())[:200]})"
        refuse(path.name, rule, "Write the file again, or use JSON lines")


def _plain(value: Any, column: str, where: str) -> Any:
    """A value of a column as plain data: times in ISO 8601, decimals as text, which keeps them exact. Pictures that are
    stored in a record are refused where they are read."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, bytes) and column not in PICTURES:
        refuse(where, f"the column {column} holds bytes, which no task reads", "Drop it, or store text")
    if isinstance(value, dict):
        return {key: _plain(each, column, where) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, column, where) for each in value]
    return value


def refuse(where: str, rule: str, remedy: str = FORMS) -> NoReturn:
    """Raise the error of a record of another form."""
    raise ConfigError("data.corpus.files", where, rule, remedy)
