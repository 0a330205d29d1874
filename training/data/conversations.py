"""Conversations as a corpus: JSON lines or Parquet, in the forms that Hugging Face's trainers take.

A record has ``messages``, a list of ``{role, content}``; or ``prompt`` and ``completion``, each a text or a list of
messages, of which the completion alone is scored. A message with ``scored: false`` is not scored. Other columns are
kept; tasks with rewards read them.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from registry.enforcing import enforced
from registry.errors import ConfigError
from registry.extras import require
from registry.ranges import BelowOne, Whole
from training.data.corpus import SPLITS, Corpus, Split
from training.data.text import ENOUGH_DOCUMENTS, QUICK_BYTES, assign, expand

ROLES = ("system", "user", "assistant")
FORMS = 'Write {"messages": [{"role": "user", "content": "…"}, …]} or {"prompt": "…", "completion": "…"}'


@dataclass(frozen=True)
class Conversation:
    """A conversation.

    Args:
        where: file and line, for messages
        messages: role, content and, where false, scored, of each turn
        columns: the record's other columns
    """

    where: str
    messages: list[dict[str, Any]]
    columns: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
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
        digest = hashlib.sha256(json.dumps([self.val_fraction, self.test_fraction, self.split_seed]).encode())
        for path in self._paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted({path for pattern in self.files for path in expand(pattern)})

    def _all(self) -> Iterator[Conversation]:
        return (read_record(record, where) for where, record in self._records())

    def _records(self) -> Iterator[tuple[str, Any]]:
        for path in self._paths:
            yield from _parquet(path) if path.suffix == ".parquet" else _json_lines(path)

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
        _refuse(where, f"a record must be a mapping, not {type(record).__name__}")
    if "messages" in record:
        messages = _turns(record["messages"], "messages", where)
        used = {"messages"}
    elif {"prompt", "completion"} <= set(record):
        prompt = _turns(record["prompt"], "prompt", where, "user")
        messages = [{**turn, "scored": False} for turn in prompt] + _turns(
            record["completion"], "completion", where, "assistant"
        )
        used = {"prompt", "completion"}
    else:
        _refuse(where, f"a record needs messages, or prompt and completion; this has {', '.join(map(str, record))}")
    if any(turn["role"] == "system" for turn in messages[1:]):
        _refuse(where, "a system message must be the first")
    return Conversation(where, messages, {k: v for k, v in record.items() if k not in used})


def _turns(value: Any, key: str, where: str, role: str | None = None) -> list[dict[str, Any]]:
    if isinstance(value, str) and role is not None:
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        _refuse(where, f"{key} must be a list of messages{' or a text' if role else ''}, and not empty")
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            _refuse(where, f"a message of {key} needs a role and a content, both text: {str(turn)[:80]}")
        if turn.get("role") not in ROLES:
            _refuse(where, f"the role {str(turn.get('role'))!r} is none of {', '.join(ROLES)}")
        if turn["role"] == "assistant" and not turn["content"]:
            _refuse(where, "an answer is empty")
    return [{k: turn[k] for k in ("role", "content", "scored") if k in turn} for turn in value]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path.name}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    _refuse(f"{path.name}:{number}", f"is no line of JSON ({error})")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    require("parquet", "pyarrow", path="data.corpus.files", value=path.name)
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{path.name}:{number}", {k: v for k, v in record.items() if v is not None}


def _refuse(where: str, rule: str) -> NoReturn:
    raise ConfigError("data.corpus.files", where, rule, FORMS)
