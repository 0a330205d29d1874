"""Preferences as a corpus: pairs of a chosen and a rejected answer, in the forms that TRL takes; of sorting, made.

A record has ``chosen`` and ``rejected``, each a text or a list of messages, and ``prompt``, likewise. Without it,
the prompt is what both begin with: the same messages, or the same words of two texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.formats import encode
from blockwright.training.data.conversations import (
    Conversation,
    Conversations,
    refuse,
    refuse_order,
    tools,
    turns,
    unscored,
)
from blockwright.training.data.corpora import Sorting
from blockwright.training.data.corpus import Split
from blockwright.training.data.rows import Rendering, refuse_unscored
from blockwright.training.data.tokenizers.tokenizer import token_dtype

SIDES = ("chosen", "rejected")
FORMS = 'Write {"prompt": "…", "chosen": "…", "rejected": "…"}, each a text or a list of messages'


@dataclass(frozen=True)
class Preference(Conversation):
    """A conversation with a preferred answer, and the same with another.

    Args:
        rejected: the messages of the other; ``messages`` are those of the preferred one. The answers of the prompt are
            not scored in either
    """

    rejected: list[dict[str, Any]] = field(default_factory=list)


class Preferences(Conversations):
    """Files of preferences; arguments as of ``Conversations``."""

    def read(self, record: Any, where: str) -> Conversation:
        if isinstance(record, Mapping) and record.get("images"):
            refuse(where, "it has images, which no task on pairs reads", "Remove the record, or its images")
        return read_preference(record, where)


def read_preference(record: Any, where: str) -> Preference:
    """The preference of a record.

    Args:
        record: of a file
        where: file and line

    Raises:
        ConfigError: at ``data.corpus.files``, for a record of another form, with file and line
    """
    if not isinstance(record, Mapping) or not set(SIDES) <= set(record):
        found = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        refuse(where, f"a preference needs chosen and rejected; this has {found}", FORMS)
    sides = [record[side] for side in SIDES]
    if "prompt" in record:
        prompt = turns(record["prompt"], "prompt", where, "user")
        answers = [_without(prompt, turns(record[side], side, where, "assistant")) for side in SIDES]
    elif all(isinstance(side, str) for side in sides):
        n = _shared_text(*sides)
        prompt = [{"role": "user", "content": sides[0][:n]}] if n else []
        answers = [turns(side[n:], name, where, "assistant") for side, name in zip(sides, SIDES, strict=True)]
    else:
        whole = [turns(record[side], side, where) for side in SIDES]
        n = next((i for i, (a, b) in enumerate(zip(*whole, strict=False)) if a != b), min(map(len, whole)))
        prompt, answers = whole[0][:n], [side[n:] for side in whole]
    if not prompt:
        refuse(where, "chosen and rejected begin differently, so they share no prompt", FORMS)
    if answers[0] == answers[1]:
        refuse(where, "chosen and rejected are the same, so nothing is preferred", "Remove the record")
    for side, answer in zip(SIDES, answers, strict=True):
        if not answer or answer[-1]["role"] != "assistant":
            refuse(where, f"{side} must continue the prompt and end with an answer (role assistant)", FORMS)
        refuse_order([*prompt, *answer], where)
    columns = {k: v for k, v in record.items() if k not in {*SIDES, "prompt", "tools"}}
    chosen, rejected = ([*unscored(prompt), *answer] for answer in answers)
    return Preference(where, chosen, columns, tools(record, where), rejected)


def _without(prompt: list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages after the prompt, which some data sets repeat in both answers."""
    return messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


def _shared_text(a: str, b: str) -> int:
    """Characters of the words that both texts begin with; the blank after them belongs to the answers, as in TRL."""
    n = len(os.path.commonprefix([a, b]))  # noqa: RUF071 # by characters
    while n and not a[n - 1].isspace():
        n -= 1
    return n - 1 if n else 0


class PairRendering(Rendering):
    """Encodes the JSON of a preference: the tokens of both conversations, with ``separator`` between them.

    A pair with a conversation longer than a row is dropped, and counted: what it differs in may be at the end.
    """

    kind: ClassVar[str] = "preference"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.separator = self.vocab_size  # no annotated token
        self.vocab_size += 1

    def read(self, text: str) -> list[Conversation]:
        pair = Preference.from_json(text)
        if not pair.rejected:
            rule = "the corpus gives conversations without a rejected answer"
            corpus = "blockwright.plugins.alignment.data.preferences.Preferences"
            remedy = f"Write data.corpus._target_={corpus}, or use data=chat"
            raise ConfigError("data.corpus", pair.where, rule, remedy)
        return [Conversation(pair.where, side, {}, pair.tools) for side in (pair.messages, pair.rejected)]

    def encode(self, text: str) -> npt.NDArray[Any]:
        self.counts["pairs"] += 1
        found: list[npt.NDArray[Any]] = []
        for each in self.read(text):
            ids, scored = encode(self.chat.render(each.messages, each.tools), self.tokenizer)
            refuse_unscored(each, bool(scored.any()))
            found.append(2 * ids + scored)
        dtype = token_dtype(self.vocab_size)
        if max(map(len, found)) > self.longest:
            self.counts["dropped"] += 1
            return np.zeros(0, dtype=dtype)
        return np.concatenate([found[0], [self.separator], found[1]]).astype(dtype)


class SortingPreferences(Sorting):
    """For each demonstration the other order, which is rejected; with ``falling`` 0 the rising order is chosen."""

    def conversations(self, split: Split) -> Iterator[Conversation]:
        for each in super().conversations(split):
            prompt, answer = each.messages
            if (other := answer["content"][::-1]) != answer["content"]:  # else all digits are the same
                rejected = [prompt, {**answer, "content": other}]
                yield Preference(each.where, each.messages, each.columns, rejected=rejected)
