"""Procedural problems with verifiers: the package reasoning-gym as a corpus (extra ``alignment``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError, did_you_mean, require
from blockwright.registry.ranges import Count, Whole
from blockwright.training.data.conversations import Conversation, ConversationCorpus
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.fingerprint import digest, state


@enforced("data.corpus")
class ReasoningGym(ConversationCorpus):
    """Problems of Stojanovski et al. 2025, arXiv 2505.24760, drawn by task, seed and number.

    A record's columns say which problem it is, so that the reward ``reasoning_gym`` can draw it again and ask its own
    verifier. Splits have other seeds; a training problem whose question is held out is left out.

    Args:
        tasks: names of tasks, which take turns: ``[chain_sum, countdown]``
        train: problems to train on, at most
        held_out: problems for each of val and test
        settings: task → its settings, e.g. ``{chain_sum: {max_terms: 3}}``
        salt: of the draws; not the seed of the run
    """

    def __init__(
        self,
        tasks: list[str],
        train: Count = 10000,
        held_out: Count = 256,
        settings: dict[str, dict[str, Any]] | None = None,
        salt: Whole = 0,
    ) -> None:
        require("alignment", "reasoning_gym", path="data.corpus", value="ReasoningGym")
        self.tasks, self.settings, self.salt = tasks, settings or {}, salt
        self.sizes: dict[Split, int] = {"train": train, "val": held_out, "test": held_out}
        for name in [*tasks, *self.settings]:
            problems(name, self.settings.get(name, {}), 0, 1)

    def conversations(self, split: Split) -> Iterator[Conversation]:
        others = () if split != "train" else SPLITS[1:]
        held = {item["question"] for other in others for _, item in self._drawn(other)}
        for columns, item in self._drawn(split):
            if item["question"] not in held:
                messages = [
                    {"role": "user", "content": item["question"], "scored": False},
                    {"role": "assistant", "content": str(item["answer"])},
                ]
                where = f"{columns['task']} {split}:{columns['number']}"
                yield Conversation(where, messages, {**columns, "answer": str(item["answer"])})

    def _drawn(self, split: Split) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
        seed, size = len(SPLITS) * self.salt + SPLITS.index(split), self.sizes[split]
        made = {name: problems(name, self.settings.get(name, {}), seed, size) for name in self.tasks}
        for i in range(size):
            name = self.tasks[i % len(self.tasks)]
            columns = {"task": name, "settings": self.settings.get(name, {}), "seed": seed, "number": i}
            yield columns, made[name][i]

    def check(self) -> None:
        pass  # nothing is read

    def is_small(self) -> bool:
        return False

    def fingerprint(self) -> str:
        from importlib.metadata import version

        return digest(version("reasoning-gym"), state(self))


def problems(task: str, settings: Mapping[str, Any], seed: int, size: int) -> Any:
    """The problems of a task, drawn by number.

    Raises:
        ConfigError: no such task, or settings that it does not take
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        remedy = did_you_mean(task, DATASETS)
        raise ConfigError("data.corpus.tasks", task, "reasoning-gym has no such task", remedy)
    try:
        return create_dataset(task, **{**settings, "seed": seed, "size": size})
    except (TypeError, AssertionError, ValueError) as error:
        rule = f"{task} does not take these settings ({error})"
        raise ConfigError("data.corpus.settings", dict(settings), rule, "See the task's configuration") from None
