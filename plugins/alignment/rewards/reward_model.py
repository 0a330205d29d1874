from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright import registry
from blockwright.plugins.alignment.rewards.rewards import Column, Reward, Rewards, Texts
from blockwright.registry import BlockError, Node, Scope, register
from blockwright.registry.ranges import Count, Positive
from blockwright.registry.schema import Place
from blockwright.training.data.chat.formats import encode
from blockwright.training.data.chat.jinja import reread
from blockwright.training.data.tokenizers.rebuild import rebuild

if TYPE_CHECKING:
    from blockwright.blocks.decoder import Decoder


@register("reward", "reward_model")
class Learned(Reward):
    """The score that a reward model gives to a completion: a run of ``task=reward``.

    Its conversation is written in the reward model's own chat format and tokenizer, with the end of an answer after the
    completion, whether it ended or not. A conversation with more tokens than the model has positions is not judged: it
    counts as failed. The model is loaded at the first call, in fp32, on the device that the process trains on, and is
    not trained.

    Args:
        run: folder of the run, or a checkpoint of it
        batch_size: conversations scored at once
        timeout_s: seconds for the completions of a rollout
    """

    def __init__(self, run: Place, batch_size: Count = 16, timeout_s: Positive = 600.0) -> None:
        from blockwright.blocks.checkpoint.source import read_start, tokenizer_state

        checkpoint = read_start(Path(run))
        stored, tokenizer = checkpoint.get("reward_model"), tokenizer_state(checkpoint)
        if not stored or not tokenizer:
            raise BlockError("run", run, "is no run of a reward model", "Train one: task=reward data=preferences")
        self.run, self.batch_size, self.timeout_s = run, batch_size, timeout_s
        self.tokenizer = rebuild(tokenizer)
        form = reread(stored["chat"], self.tokenizer)
        self.chat = registry.build("chat", Node(form, "task.reward.run"), Scope({}, {}))
        self.chat.prepare(self.tokenizer)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        from blockwright.blocks.position.base import alike

        before = columns.get("messages") or [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows = [self._ids(*each) for each in zip(before, completions, strict=True)]
        scores: list[float | None] = [math.nan] * len(rows)
        fits = [i for i, row in enumerate(rows) if len(row) <= self._decoder.config["max_positions"]]
        for batch in alike(self._decoder, [len(rows[i]) for i in fits], self.batch_size):
            some = [fits[place] for place in batch]
            for i, score in zip(some, self._score([rows[i] for i in some]), strict=True):
                scores[i] = score
        return scores

    def _ids(self, messages: Sequence[Any], completion: str) -> list[int]:
        """A conversation up to the end of its answer."""
        ids, scored = encode(
            self.chat.render([*messages, {"role": "assistant", "content": completion}]), self.tokenizer
        )
        return ids[: int(scored.nonzero()[0][-1]) + 1].tolist()

    def _score(self, rows: list[list[int]]) -> list[float]:
        import torch

        device, longest = self._decoder.embedding.weight.device, max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device, dtype=torch.int64)
        with torch.no_grad():
            hidden, _ = self._decoder.hidden(tokens)  # causal: padding on the right is not seen
            last = hidden[range(len(rows)), [len(row) - 1 for row in rows]]
            return self._decoder.logits(last)[:, self.tokenizer.eos].tolist()

    @cached_property
    def _decoder(self) -> Decoder:
        import torch

        from blockwright.blocks.checkpoint.source import load

        return load(Path(self.run), device="cuda" if torch.cuda.is_initialized() else "cpu")
