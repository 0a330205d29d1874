"""Prompts as documents of tokens, and the order in which rollouts take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.base import encode
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.rendering import Rendering
from blockwright.training.data.rows import RowOrder
from blockwright.training.data.tokenizers.base import token_dtype


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
