"""Decoders that need no training: one that has the oracles of skills, one that says the same always."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.plugins.skills.rows import ids_of
from blockwright.plugins.skills.skill.base import MARKS, Skill
from blockwright.training.data.tokenizers.tokenizer import Chars

TOKENIZER = Chars(96)
IDS = ids_of(TOKENIZER)


class OracleDecoder(nn.Module):
    """Answers each question by the oracle of the skill whose mark the row has, from the tokens before it.

    Args:
        skills: in the order of their marks
        wrong: rows of which it answers nothing right
    """

    def __init__(self, skills: Sequence[Skill], wrong: int = 0) -> None:
        super().__init__()
        self.skills, self.wrong = skills, wrong
        self.embedding, self.layers = nn.Embedding(1, 1), nn.ModuleList()
        self.symbol_of = {int(token): symbol for symbol, token in enumerate(IDS)}

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        return torch.tensor([[self._next(row, t) for t in range(len(row))] for row in tokens.tolist()])[..., None], []

    def _next(self, row: list[int], t: int) -> int:
        symbols = [self.symbol_of[token] for token in row]
        try:
            answer = self.skills[MARKS.index(symbols[0])].oracle(symbols[1 : t + 1])
        except (LookupError, ValueError, StopIteration):
            return 0  # no question yet
        return int(IDS[answer])

    def logits(self, hidden: Tensor) -> Tensor:
        return 50.0 * nn.functional.one_hot(hidden[..., 0], 96).float()


class Silent(OracleDecoder):
    """Answers nothing right."""

    def _next(self, row: list[int], t: int) -> int:
        return 0
