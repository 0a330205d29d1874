"""Rows of the skills of a run, as tokens: the one place where symbols become ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.plugins.skills.skill.base import BLANK, MARKS, SYMBOLS, Bools, Ints, Skill, random_state
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.order import PADDING
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

LETTERS = "".join(map(chr, range(ord("!"), ord("!") + SYMBOLS)))  # a character of one byte for each symbol


def ids_of(tokenizer: Tokenizer) -> Ints:
    """The id of every symbol [symbols]; fewer if the tokenizer joins or does not know some."""
    if not tokenizer.fitted:
        tokenizer.fit([LETTERS])
    ids = np.asarray(tokenizer.encode(LETTERS), dtype=np.int64)
    return ids if len(np.unique(ids)) == SYMBOLS else np.unique(ids)


def framed(symbols: Ints, scored: Bools, place: int, ids: Ints, length: int) -> tuple[Ints, Ints]:
    """Tokens and targets [n, length] of rows of the skill at a place in a run's list.

    A row begins with the skill's mark, which is no answer, and ends with blanks.

    Args:
        symbols, scored: of ``Questions`` [n, L]; L is at most ``length``
        place: of the skill
        ids: of the symbols
        length: T
    """
    n, used = symbols.shape
    rows = np.full((n, length + 1), BLANK, dtype=np.int64)
    rows[:, 0], rows[:, 1 : used + 1] = MARKS[place], symbols
    targets = np.full((n, length), IGNORED, dtype=np.int64)
    targets[:, :used][scored] = ids[symbols[scored]]
    return ids[rows[:, :-1]], targets


@dataclass(frozen=True)
class Mixed:
    """Rows that take the skills in turn, each row at one of its skill's levels.

    Args:
        skills: of the run
        ids: of the symbols
        sequence_length: T, tokens of a row
        seed: of the rows of training; val and test have the same rows under every seed
    """

    skills: Sequence[Skill]
    ids: Ints
    sequence_length: int
    seed: int

    def row(self, split: Split, number: int) -> tuple[Ints, Ints]:
        """Tokens and targets [1, T] of a row."""
        random = random_state(SPLITS.index(split), self.seed if split == "train" else 0, number)
        place = number % len(self.skills)
        skill = self.skills[place]
        row = skill.row(skill.levels[random.randint(len(skill.levels))], random)
        scored = np.zeros((1, len(row.symbols)), dtype=bool)
        scored[:, row.scored] = True
        symbols = np.array([row.symbols], dtype=np.int64)
        return framed(symbols, scored, place, self.ids, self.sequence_length)


class SkillRows(Dataset[dict[str, Tensor]]):
    """Batches of such rows.

    Args:
        mixed: what the rows are
        split: that they belong to
    """

    def __init__(self, mixed: Mixed, split: Split) -> None:
        self.mixed, self.split = mixed, split

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """The batch of these rows, −1 for one that is not scored: tokens, targets [B, T] and n_bytes [B]."""
        drawn = [self.mixed.row(self.split, max(row, 0)) for row in rows]
        tokens, targets = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        targets[np.array(rows) == PADDING] = IGNORED
        batch = {"tokens": tokens, "targets": targets, "n_bytes": (targets != IGNORED).sum(axis=1)}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    __getitem__ = __getitems__  # called by a loader whose items are lists, without a batch sampler
