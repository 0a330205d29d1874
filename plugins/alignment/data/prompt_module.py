"""The data module of prompts, for tasks that sample completions and reward them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.data.chat.formats import Chat, encode
from blockwright.training.data.conversations import Conversation, ConversationCorpus
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.modules.batches import Batches
from blockwright.training.data.modules.chat import ChatDataModule
from blockwright.training.data.modules.text import Batching
from blockwright.training.data.order import PADDING, LineBatches
from blockwright.training.data.rows import Rendering, RowOrder
from blockwright.training.data.tokenizers.tokenizer import token_dtype

# --- prompts as documents of tokens, and the order in which rollouts take them ----------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        ids: its tokens, up to where the model answers
        text: of the last message
        columns: other columns of its record, and ``messages``, all of the conversation so far
    """

    ids: list[int]
    text: str
    columns: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: list[int], conversation: Conversation) -> Prompt:
        """That of a conversation without its last answer."""
        messages = before_answer(conversation)
        return cls(ids, messages[-1]["content"], {**conversation.columns, "messages": messages})


class PromptRendering(Rendering):
    """Encodes what comes before the last answer of a conversation, as the beginning of an answer."""

    kind: ClassVar[str] = "prompt"

    def check(self, texts: Iterable[str]) -> None:
        """Refuse texts that the tokenizer does not cover, and records with nothing to answer."""
        conversations = [Conversation.from_json(text) for text in texts]
        self.tokenizer.check(self._contents(conversations))
        for each in conversations:
            self.chat.open(before_answer(each), each.tools)

    def encode(self, text: str) -> npt.NDArray[Any]:
        conversation = Conversation.from_json(text)
        ids, _ = encode(self.chat.open(before_answer(conversation), conversation.tools), self.tokenizer)
        if not 0 < len(ids) <= self.longest:
            rule = f"the prompt of {conversation.where} has {len(ids)} tokens"
            remedy = f"Raise data.sequence_length to {len(ids)}, or shorten the prompt"
            raise ConfigError("data.sequence_length", self.longest, rule, remedy)
        return (2 * ids).astype(token_dtype(self.vocab_size))


def before_answer(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages that a model answers: all but a last answer.

    Raises:
        ConfigError: there are none
    """
    messages = conversation.messages
    found = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not found:
        rule = "the record has no message before the answer, so there is nothing to answer"
        raise ConfigError("data.corpus.files", conversation.where, rule, "Add a message of the user")
    return found


class RolloutBatches(Sampler[list[tuple[int, int, int]]]):
    """Batch sampler of (prompt, rollout, update): each batch of prompts comes ``updates`` times.

    Global batch b belongs to rollout b // updates, whatever the number of ranks. The arguments are those of
    ``EpochBatches``.

    Args:
        order: of the prompts
        updates: optimizer steps on each rollout
        rank: number of this data-parallel process
        world_size: data-parallel processes; divides ``order.batch_size``
        epoch_length: batches that the trainer calls an epoch
        consumed: returns the number of global batches consumed by training
    """

    def __init__(
        self,
        order: RowOrder,
        updates: int,
        rank: int,
        world_size: int,
        epoch_length: int,
        consumed: Callable[[], int],
    ) -> None:
        self.order, self.updates, self.rank, self.world_size = order, updates, rank, world_size
        self.epoch_length, self.consumed = epoch_length, consumed

    def __len__(self) -> int:
        return self.order.n_batches * self.updates

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        first = self.consumed()
        return self._batches(first, (first // self.epoch_length + 1) * self.epoch_length)

    def _batches(self, first: int, last: int) -> Iterator[list[tuple[int, int, int]]]:
        share, drawn, prompts = self.order.batch_size // self.world_size, -1, np.zeros((0, 0), dtype=np.int64)
        for batch in range(first, last):
            rollout, update = divmod(batch, self.updates)
            epoch, row = divmod(rollout, self.order.n_batches)
            if epoch != drawn:
                drawn, prompts = epoch, self.order.epoch(epoch)
            mine = prompts[row, self.rank * share : (self.rank + 1) * share]
            yield [(prompt, rollout, update) for prompt in mine.tolist()]


class PromptRows(Dataset[dict[str, Tensor]]):
    """Batches of prompts by number: ``tokens`` [P,T], padded on the right with 0, ``lengths``, ``prompt``, ``rollout``
    and ``update`` [P]. An empty prompt, number −1, fills the last batch of an evaluation on several processes."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def __getitems__(self, items: list[Any]) -> dict[str, Tensor]:
        rows = [item if isinstance(item, tuple) else (item, 0, 0) for item in items]
        ids = [[] if number == PADDING else self.prompts[number].ids for number, _, _ in rows]
        tokens = torch.zeros(len(rows), max(1, *map(len, ids)), dtype=torch.int64)
        for row, prompt in zip(tokens, ids, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        number, rollout, update = torch.tensor(rows, dtype=torch.int64).unbind(1)
        lengths = torch.tensor([len(prompt) for prompt in ids], dtype=torch.int64)
        return {"tokens": tokens, "lengths": lengths, "prompt": number, "rollout": rollout, "update": update}

    __getitem__ = __getitems__  # called by a loader whose items are lists, without a batch sampler


@register("data", "prompts")
class PromptDataModule(ChatDataModule):
    """Prompts in an order that is a function of the seed and the rollout.

    ``prompts(split)`` gives their texts and columns by number, on every process.

    Args:
        batching: the corpus, and how it is made into batches: ``sequence_length`` is the longest prompt in tokens,
            ``batch_size`` the prompts of a rollout over all processes
        chat: the format of conversations
        updates: optimizer steps on each rollout, each on an equal part of its completions
    """

    def __init__(self, batching: Batching, chat: Chat, updates: Count = 1) -> None:
        super().__init__(batching, chat)
        self.updates = updates
        self._prompts: dict[Split, list[Prompt]] = {}

    def _render(self) -> PromptRendering:
        return PromptRendering(self.tokenizer, self.chat, self.sequence_length)

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a split; needs ``setup``."""
        return self._prompts[split]

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        assert isinstance(self.corpus, ConversationCorpus)
        for split in SPLITS:
            stream, corpus = self._streams[split], self.corpus
            bounds = [*stream.starts.tolist(), stream.n_tokens]
            ids = (stream.tokens[a : b - 1].astype(int) // 2 for a, b in pairwise(bounds))
            self._prompts[split] = [
                Prompt.of(tokens.tolist(), each) for tokens, each in zip(ids, corpus.conversations(split), strict=True)
            ]

    @property
    def order(self) -> RowOrder:  # type: ignore[override]
        return RowOrder(len(self._streams["train"].starts), self.batch_size, self.seed)

    def train_dataloader(self) -> Batches:
        rank, world_size = self._share()
        sampler = RolloutBatches(
            self.order, self.updates, rank, world_size, self._epoch_length(), self._consumed_in_order
        )
        return self._loader(self._train_rows(), batch_sampler=sampler)

    def _describe(self) -> str:
        sizes = ", ".join(f"{len(self._streams[split].starts):,} to {split}" for split in SPLITS)
        return f"prompts: {sizes}"

    def _check_lengths(self) -> None:
        if not self._streams["train"].n_tokens:
            raise ConfigError("data.corpus", type(self.corpus).__name__, "gives no prompt to train on", "Add some")

    def _dataset(self, split: Split, length: int) -> PromptRows:
        return PromptRows(self._prompts[split])

    def _line(self, split: Split, length: int, batch_size: int) -> LineBatches:
        return LineBatches(len(self._prompts[split]) + 1, 1, batch_size, self.eval_windows, *self._share())

    def _epoch_length(self) -> int:
        n_batches = self.order.n_batches * self.updates
        limit = self.trainer.limit_train_batches if self.trainer else None
        if limit is None:
            return n_batches
        return max(1, min(n_batches, limit if isinstance(limit, int) else int(n_batches * limit)))

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "updates": self.updates}
