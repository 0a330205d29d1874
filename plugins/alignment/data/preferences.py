"""Pairs of a chosen and a rejected answer as a corpus, in the forms that TRL takes or made, and their data module.

A record has ``chosen`` and ``rejected``, each a text or a list of messages, and ``prompt``, likewise. Without it,
the prompt is what both begin with: the same messages, or the same words of two texts. Both answers are scored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockwright.registry import register
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
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.modules.batches import Batches
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.order import PADDING, LineBatches
from blockwright.training.data.packing import Ints, Stream
from blockwright.training.data.rows import Rendering, Rows, best_fit, refuse_unscored
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


class Pairs(Rows):
    """Batches of P pairs: 2·P conversations, the chosen ones first, packed into rows as long as the longest.

    ``tokens``, ``targets``, ``segments``, ``positions`` as in ``Rows``; ``sequence`` [B,T], the number of the
    conversation that a scored target belongs to, else −1; ``pair`` [P], the numbers of the pairs in their split.

    Args:
        stream: the annotated tokens (``preferences.py``), a pair each
        separator: between the two conversations of a pair
        token_bytes: UTF-8 bytes of each id [V]
    """

    def __init__(self, stream: Stream, separator: int, token_bytes: Ints) -> None:
        self.separator = separator
        super().__init__(stream, 0, token_bytes)

    def _arrange(self) -> list[list[int]]:
        """The two conversations of each pair, as items of their own."""
        between = np.flatnonzero(self.stream.tokens == self.separator).astype(np.int64)
        lengths = np.stack([between - self.starts, self.starts + self.lengths - between - 1], 1)
        self.starts, self.lengths = np.stack([self.starts, between + 1], 1).ravel(), lengths.ravel()
        return [[2 * pair, 2 * pair + 1] for pair in range(len(between))]

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """The batch of these pairs, by number; −1 is left out, and without any there is one row of padding."""
        real = [pair for pair in rows if pair != PADDING]
        items = [self.rows[pair][side] for side in (0, 1) for pair in real]
        lengths = self.lengths[items] if items else np.zeros(0, dtype=np.int64)
        T = int(lengths.max(initial=2))
        packed = best_fit(lengths, T) or [[]]
        filled = [self._row([items[i] for i in row], T) for row in packed]
        batch = {name: np.stack([each[name] for each in filled]) for name in filled[0] if name != "n_bytes"}
        numbers = np.stack(
            [np.append(row, PADDING)[each["segments"]] for row, each in zip(packed, filled, strict=True)]
        )
        batch["sequence"] = np.where(batch["targets"] >= 0, numbers, -1).astype(np.int64)
        return {**{k: torch.from_numpy(v) for k, v in batch.items()}, "pair": torch.tensor(real, dtype=torch.int64)}

    __getitem__ = __getitems__  # called by a loader whose items are lists, without a batch sampler


@register("data", "preferences")
class PreferenceDataModule(ChatDataModule):
    """Pairs of a chosen and a rejected answer, in an order that is a function of seed and epoch.

    Args:
        batching: the corpus, of ``Preference``s, and how it is made into batches: ``sequence_length`` is the longest
            conversation in tokens, ``batch_size`` the pairs of a step over all processes
        chat: the format of conversations
    """

    rendering: PairRendering

    def _render(self) -> PairRendering:
        return PairRendering(self.tokenizer, self.chat, self.sequence_length)

    def _describe(self) -> str:
        dropped = self._pack().vocabulary["counts"].get("dropped", 0)
        sizes = ", ".join(f"{self.number(split):,} to {split}" for split in SPLITS)
        return f"preferences: {sizes}; {dropped:,} dropped (data.sequence_length={self.sequence_length})"

    def _check_lengths(self) -> None:
        if not self._streams["train"].n_tokens:
            rule = "no pair of the train split fits: both of its conversations must"
            raise ConfigError("data.sequence_length", self.sequence_length, rule, "Raise data.sequence_length")

    def _make_rows(self, split: Split, length: int) -> Pairs:
        return Pairs(self._streams[split], self.rendering.separator, self.tokenizer.token_bytes())

    def tokens(self, split: Split, places: slice = slice(None)) -> npt.NDArray[Any]:
        """As in ``ChatDataModule``; the two conversations of a pair have the token that ends documents between them."""
        marked = self._streams[split].tokens[places]
        return np.where(marked == self.rendering.separator, self.tokenizer.eos, marked // 2)

    @property
    def key(self) -> str:
        """A digest of what the tokens of all pairs depend on; needs ``setup``."""
        assert self._key is not None
        return self._key

    def number(self, split: Split) -> int:
        """The pairs of a split; needs ``setup``."""
        return len(self._packed(split, self.sequence_length))

    def every(self, split: Split) -> Batches:
        """All pairs of a split in order; equally many batches on every process."""
        line = LineBatches(self.number(split) + 1, 1, self.eval_batch_size, None, *self._share())
        return self._loader(self._dataset(split, self.sequence_length), batch_sampler=line)
