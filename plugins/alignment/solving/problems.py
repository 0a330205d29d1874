"""The task file of ``blockwright evaluate MODEL --task FILE``: prompts, a reward, and how answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt

from blockwright import registry
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.alignment.data.prompt_module import Prompt, before_answer
from blockwright.plugins.alignment.rewards.judging import refuse_lacking
from blockwright.plugins.alignment.rewards.rewards import Reward
from blockwright.registry import ConfigError, Node, Scope
from blockwright.registry.enforcing import enforced
from blockwright.registry.limits import read_text
from blockwright.registry.ranges import Count, Fraction, Number, Share
from blockwright.registry.reading import Remedy
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.data.chat.formats import Chat, encode
from blockwright.training.data.conversations import ConversationCorpus, Conversations
from blockwright.training.data.corpus import Split
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

EXAMPLE = "Write prompts: FILE.jsonl, reward: exact_match and samples: 8, a line each"


@enforced("task")
@dataclass(frozen=True)
class Problems:
    """A task file.

    Args:
        reward: node of the reward that judges completions
        prompts: file or glob of records, as of ``data.corpus.files``: all of them are asked
        corpus: node of a corpus in place of files, as ``data.corpus``
        split: of the corpus
        chat: node of the chat format, as ``data.chat``; null for that of the run, or ``plain`` where it has none
        samples: completions of a prompt; the likeliest one is measured besides
        k: numbers of attempts of pass@k, at most ``samples``
        right: least reward of a completion that counts as right
        max_new_tokens: tokens of a completion
        temperature, top_k, top_p, min_p: of sampling
    """

    reward: Annotated[str | dict[str, Any], Remedy(EXAMPLE)]
    prompts: str | list[str] | None = None
    corpus: dict[str, Any] | None = None
    split: Split = "test"
    chat: str | dict[str, Any] | None = None
    samples: Count = 8
    k: list[Count] | None = None
    right: Number = 1.0
    max_new_tokens: Count = 256
    temperature: Annotated[float, Gt(0)] = 1.0
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Fraction | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.corpus is None):
            rule = "a task has either prompts, which are files, or a corpus"
            raise ConfigError("task.prompts", self.prompts, rule, EXAMPLE)
        for k in self.attempts:
            if k > self.samples:
                rule = f"pass@k is estimated from {self.samples} samples"
                raise ConfigError("task.k", k, rule, "Raise samples, or lower k")

    @property
    def attempts(self) -> list[int]:
        return sorted({1, self.samples}) if self.k is None else self.k

    def sampling(self) -> Sampling:
        """How completions are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)

    def judge(self) -> Reward:
        """The reward."""
        scope = Scope({}, {"max_new_tokens": self.max_new_tokens}, own=True)
        return registry.build("reward", Node(self.reward, "task.reward"), scope)

    def asked(
        self, tokenizer: Tokenizer, limit: int | None, usual: str | dict[str, Any] | None = None
    ) -> tuple[list[Prompt], Chat]:
        """The prompts, as the chat format asks them, and the format.

        Args:
            tokenizer: of the model
            limit: number of prompts; None for all
            usual: the format of the run

        Raises:
            ConfigError: none, or one that the tokenizer does not cover, or that lacks a column which the reward reads
        """
        node, scope = Node(self.chat or usual or "plain", "task.chat"), Scope({}, {}, own=bool(self.chat))
        chat = registry.build("chat", node, scope)
        chat.prepare(tokenizer)
        found: list[Prompt] = []
        corpus, split = self._corpus()
        for conversation in corpus.conversations(split):
            if limit is not None and len(found) == limit:
                break
            messages = before_answer(conversation)
            tokenizer.check([message["content"] for message in messages])
            ids, _ = encode(chat.open(messages, conversation.tools), tokenizer)
            found.append(Prompt.of(ids.tolist(), conversation))
        if not found:
            raise ConfigError("task.prompts", self.prompts, "there is no prompt to answer", EXAMPLE)
        refuse_lacking(found, self.judge())
        return found, chat

    def _corpus(self) -> tuple[ConversationCorpus, Any]:
        if self.prompts is not None:
            return Conversations(self.prompts, 0.0, 0.0), "train"
        corpus = instantiate(self.corpus, "task.corpus")
        if not isinstance(corpus, ConversationCorpus):
            rule = "holds no conversations"
            raise ConfigError("task.corpus", type(corpus).__name__, rule, "Name a corpus of data=chat or data=prompts")
        return corpus, self.split


def read_problems(file: Path) -> Problems:
    """Read a task file.

    Raises:
        ConfigError: it cannot be read, or a value is wrong
    """
    if not file.is_file():
        raise ConfigError("--task", str(file), "there is no such file", EXAMPLE)
    values = registry.to_plain(read_text(file, "--task", EXAMPLE), "task")
    return read_settings(Problems, values, "task")
