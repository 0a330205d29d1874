"""Drafts by the model's own multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.state import State
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.drafts.base import Checked, Drafter, Drafts, draw_drafts, next_positions
from blockwright.blocks.generation.joining import joinable_caches_of_depths
from blockwright.blocks.generation.sample import Draws
from blockwright.registry import BlockError


class MultiToken(Drafter):
    """Drafts by the depths of multi-token prediction: the first drafts the next token but one, and so on.

    Args:
        depths: to be used; None for all that the model has

    Raises:
        BlockError: the model has fewer
    """

    def __init__(self, decoder: Decoder, depths: int | None = None) -> None:
        known = len(decoder.mtp)
        if not known:
            rule = "drafts are of multi-token prediction, which this model has not"
            raise BlockError("drafts", "mtp", rule, "Train with 'model.mtp={depth:1}', or use another kind of drafts")
        if depths is not None and not 1 <= depths <= known:
            rule = f"is 1 to {known}, the depths of the model's multi-token prediction"
            raise BlockError("draft_tokens", depths, rule, f"Write {known}, or leave it out")
        self.tokens = depths or known

    def new(self, decoder: Decoder, rows: int, room: int, bits: int | None) -> Drafts:
        return MultiTokenDrafts(decoder, self.tokens, rows, room, bits)


class MultiTokenDrafts(Drafts):
    """Depth k at index s of its cache pairs token s + 1 with the state of depth k − 1 at index s − 1; depth 1 with the
    model's own at index s. So all caches are as long as the model's, and depth k has k − 1 more tokens of padding.

    One pass of a depth reads the tokens that were checked, which it keeps, and the drafts of the depths before it,
    which it does not keep: they may be wrong.
    """

    reads_states = True

    def __init__(self, decoder: Decoder, depths: int, rows: int, room: int, bits: int | None) -> None:
        self.decoder = decoder
        self.depths = joinable_caches_of_depths(decoder, depths, rows, room, bits, 2 * depths)
        like = decoder.embedding.weight
        width = {"state": ((like.shape[1],), like.dtype)}
        self.before = [State(rows, 0, width, like.device) for _ in self.depths[1:]]  # the last state that is kept
        self.caches = [*self.depths, *self.before]
        self.lags = [*range(depths), *[0] * (depths - 1)]

    def read(self, hidden: Tensor, tokens: Tensor) -> None:
        last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device, dtype=torch.int64)
        for k in range(len(self.depths)):
            hidden = self._delayed(k, self._states(k, hidden, tokens), last)

    def propose(self, checked: Checked, draws: Sequence[Draws], most: int) -> list[list[int]]:
        states, tokens, last = checked.hidden, checked.tokens, checked.last
        rows, drafts = torch.arange(len(last), device=last.device), list[list[int]]()
        for k, cache in enumerate(self.depths):
            mark = cache.mark(tokens.shape[1])
            states = self._states(k, states, tokens)
            cache.rewind(mark, last + 1)
            if k < most:
                drafts.append(draw_drafts(draws, self.decoder.logits(states[rows, last + k])))
                drafted = tokens.new_tensor(drafts[-1])
                tokens = torch.cat((tokens, drafted[:, None]), 1)
                tokens[rows, last + k + 1] = drafted
            states = self._delayed(k, states, last)
        return [list(row) for row in zip(*drafts, strict=True)] if drafts else [[] for _ in rows]

    def _states(self, k: int, states: Tensor, tokens: Tensor) -> Tensor:
        """The states of a depth, which ``MTP.forward`` makes of those before it [B,≥T,D], and the tokens [B,T] that are
        k + 1 after each of these."""
        decoder, cache, n = self.decoder, self.depths[k], tokens.shape[1]
        positions, limit = next_positions(decoder, n, cache), decoder.position.limit
        of_tokens = positions + k + 1 if limit is None else (positions + k + 1).clamp(max=limit - 1)
        given = Pass(positions, cache=cache, tokens=tokens, made={})
        return decoder.mtp[k](decoder.embed(tokens, of_tokens), states[:, :n], given)[0]

    def _delayed(self, k: int, states: Tensor, last: Tensor) -> Tensor:
        """The states of a depth behind the one before them, as the next depth pairs them with tokens. Those at ``last``
        [B] are before the next ones."""
        if k == len(self.before):
            return states
        held, self.before[k].length = self.before[k].held["state"], self.depths[k].length
        earlier = held.clone()
        held.copy_(states[torch.arange(len(last), device=last.device), last])
        return torch.cat((earlier[:, None], states), 1)
