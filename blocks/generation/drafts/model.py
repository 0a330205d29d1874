"""Drafts by a smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Mark
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.drafts.base import (
    Checked,
    Drafter,
    Drafts,
    check_tokens,
    draw_drafts,
    next_positions,
)
from blockwright.blocks.generation.joining import joinable_caches, refuse_dependent_rows
from blockwright.blocks.generation.sample import Draws
from blockwright.registry import BlockError


class SmallerModel(Drafter):
    """Leviathan et al. 2023 (speculative decoding), arXiv 2211.17192, but for coupled draws instead of rejection.

    Args:
        small: the model that drafts, in evaluation mode
        tokens: drafted a pass

    Raises:
        BlockError: ``tokens`` is out of range, or a row of the model depends on the others
    """

    def __init__(self, small: Decoder, tokens: int = 4) -> None:
        check_tokens(tokens)
        refuse_dependent_rows(small)
        self.small, self.tokens = small, tokens

    def new(self, decoder: Decoder, rows: int, room: int, bits: int | None) -> Drafts:
        own, of_model = len(self.small.output_weight), len(decoder.output_weight)
        if own != of_model:
            rule = f"the model that drafts has {own} tokens, and the model that checks {of_model}"
            raise BlockError("drafts", own, rule, "Choose a model that was trained with the same tokenizer")
        limit = self.small.position.limit
        if limit is not None and room >= limit:
            rule = f"the model that drafts has positions for {limit} tokens, and rows may have {room + 1}"
            raise BlockError("drafts", limit, rule, f"Generate at most {limit} tokens, the prompt's included")
        return SmallerModelDrafts(self.small, self.tokens, rows, room, bits)


class SmallerModelDrafts(Drafts):
    """Its caches hold one token more than those of the model that checks: the last one, too."""

    def __init__(self, small: Decoder, tokens: int, rows: int, room: int, bits: int | None) -> None:
        self.small, self.tokens = small, tokens
        self.caches = joinable_caches(small, rows, room, bits, 1 + 2 * tokens)
        self.lags = [0] * len(self.caches)
        self.padding: Sequence[int] = ()

    def begin(self, first: Tensor) -> None:
        self._feed(first)

    def read(self, hidden: Tensor, tokens: Tensor) -> None:
        self._feed(tokens)

    def propose(self, checked: Checked, draws: Sequence[Draws], most: int) -> list[list[int]]:
        last, longest = checked.last, max(checked.kept)
        marks = [cache.mark(checked.tokens.shape[1]) for cache in self.caches]
        hidden = self._feed(checked.tokens)[torch.arange(len(last), device=last.device), last]
        self._rewind(marks, last + 1)
        padding = [before + longest - n for before, n in zip(self.padding, checked.kept, strict=True)]
        self.align(padding, hidden.device)
        return self._drafted(hidden, draws, most)

    def _drafted(self, hidden: Tensor, draws: Sequence[Draws], most: int) -> list[list[int]]:
        """Draft tokens after states [B,D] of the last ones, and forget them."""
        drafts: list[list[int]] = [[] for _ in draws]
        marks = [cache.mark(self.tokens) for cache in self.caches]
        for i in range(min(most, self.tokens)):
            if i:
                last = torch.tensor([row[-1:] for row in drafts], device=hidden.device, dtype=torch.int64)
                hidden = self._feed(last)[:, 0]
            for row, token in zip(drafts, draw_drafts(draws, self.small.logits(hidden)), strict=True):
                row.append(token)
        self._rewind(marks, 0)
        return drafts

    def align(self, padding: Sequence[int], device: torch.device) -> None:
        self.padding = padding
        super().align(padding, device)

    def _feed(self, tokens: Tensor) -> Tensor:
        positions = next_positions(self.small, tokens.shape[1], self.caches[0])
        return self.small.hidden(tokens, positions, caches=self.caches)[0]

    def _rewind(self, marks: Sequence[Mark], keep: int | Tensor) -> None:
        for cache, mark in zip(self.caches, marks, strict=True):
            cache.rewind(mark, keep)
