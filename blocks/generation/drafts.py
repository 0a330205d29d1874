"""Drafts: guesses of the next tokens of rows, which the model checks in one pass.

They come from the text of the row itself (what followed the last time that it read so), from a smaller model of the
same vocabulary, or from the model's own multi-token prediction.

A draft is drawn with a copy of the draws that the row's own token is then drawn with (``Draws.copy``), and counts where
both agree. So a row's tokens are those without drafts, for the same seed, whatever the draft and the sampling: there is
no residual distribution, and no second stream of random numbers. What was computed for a wrong draft, and after it, is
taken back from the caches (``Cache.rewind``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.job import joinable_caches, joinable_caches_of_depths, refuse_dependent_rows
from blockwright.blocks.generation.sample import Draws, draw_each
from blockwright.registry import BlockError

MOST = 64  # drafts of a pass: every row has memory for as many tokens more, and few are ever right


class Checked(NamedTuple):
    """What the model has computed for the rows since their last drafts.

    hidden: [B,T,D] states of tokens
    tokens: [B,T] the token after each of them
    kept: number of them that count, from the first, for each row; T for one row at least
    texts: every token of each row so far
    """

    hidden: Tensor
    tokens: Tensor
    kept: Sequence[int]
    texts: Sequence[Sequence[int]]

    @property
    def last(self) -> Tensor:
        """[B] index of the last that counts."""
        return torch.tensor(self.kept, device=self.tokens.device, dtype=torch.int64) - 1


class Drafts:
    """The drafts of the rows of one batch; this class makes none.

    Its caches, where it has some, follow the batch: rows join, move, leave and are shifted in all of them alike.

    Attributes:
        reads_states: whether it needs the states of every token of a prompt
        caches: what it remembers of each row
        lags: tokens at the start of a row that a cache never holds, in the order of ``caches``
    """

    reads_states: ClassVar[bool] = False
    caches: Sequence[Cache] = ()
    lags: Sequence[int] = ()

    def begin(self, first: Tensor) -> None:
        """Begin rows with their first tokens [B,1]."""

    def read(self, hidden: Tensor, tokens: Tensor) -> None:
        """Follow a part of prompts, all of which counts.

        Args:
            hidden: [B,T,D] states of tokens, where the drafts read states
            tokens: [B,T] the token after each of them
        """

    def propose(self, checked: Checked, draws: Sequence[Draws], most: int) -> list[list[int]]:
        """Follow what has been checked, and draft ``most`` tokens of each row at most.

        Args:
            checked: of every row of ``align``, since the last call
            draws: copies of the rows' own
            most: 0 to follow only
        """
        return [[] for _ in checked.kept]

    def align(self, padding: Sequence[int], device: torch.device) -> None:
        """Use as many rows, with so much padding before each."""
        for cache, lag in zip(self.caches, self.lags, strict=True):
            cache.use(len(padding))
            cache.padding = as_padding([n + lag for n in padding], device)


class Drafter:
    """Where drafts come from; this class drafts nothing.

    Attributes:
        tokens: drafted for one pass of the model at most
    """

    tokens: int = 0

    def new(self, decoder: Decoder, rows: int, room: int, bits: int | None) -> Drafts:
        """The drafts of a batch.

        Args:
            decoder: the model that checks them
            rows, room, bits: as of ``Batch``

        Raises:
            BlockError: they do not suit the model
        """
        return Drafts()


def draw_drafts(draws: Sequence[Draws], logits: Tensor) -> list[int]:
    """A draft of each row from logits [B,V]. From those that are not finite it is any token: all drafts are checked."""
    return draw_each(draws, logits.float().nan_to_num(posinf=0.0))


def check_tokens(tokens: int) -> None:
    """Check a number of drafts.

    Raises:
        BlockError
    """
    if not 1 <= tokens <= MOST:
        raise BlockError("draft_tokens", tokens, f"must be 1 to {MOST}", "Write e.g. 4, or leave it out")


def as_padding(of_rows: Sequence[int], device: torch.device) -> Tensor | None:
    """[B] for a cache; None where no row has any."""
    return torch.tensor(of_rows, dtype=torch.int64, device=device) if any(of_rows) else None


def next_positions(decoder: Decoder, n: int, cache: Cache) -> Tensor:
    """[B|1,n] of the next n tokens. Those of drafts that are never kept may be past the last position: they get it."""
    device, limit = decoder.embedding.weight.device, decoder.position.limit
    positions = torch.arange(cache.length, cache.length + n, device=device)[None]
    if cache.padding is not None:
        positions = (positions - cache.padding[:, None]).clamp(min=0)
    return positions if limit is None else positions.clamp(max=limit - 1)


class Lookup(Drafter):
    """Prompt look-up decoding (Saxena 2023): the tokens after the latest earlier occurrence of the row's last ones.

    It needs no weights, costs nothing, and drafts nothing where nothing repeats. It pays for texts that quote
    themselves: edits, summaries, code.

    Args:
        tokens: drafted a pass at most
        longest, shortest: number of last tokens that have to occur earlier; the longest that do are used

    Raises:
        BlockError: ``tokens`` is out of range
    """

    def __init__(self, tokens: int = 4, longest: int = 8, shortest: int = 3) -> None:
        check_tokens(tokens)
        if not 1 <= shortest <= longest:
            raise BlockError("shortest", shortest, f"must be 1 to longest ({longest})", "Write 1 or more")
        self.tokens, self.longest, self.shortest = tokens, longest, shortest

    def new(self, decoder: Decoder, rows: int, room: int, bits: int | None) -> Drafts:
        return LookupDrafts(self)


class LookupDrafts(Drafts):
    def __init__(self, drafter: Lookup) -> None:
        self.drafter = drafter

    def propose(self, checked: Checked, draws: Sequence[Draws], most: int) -> list[list[int]]:
        sizes = self.drafter.longest, self.drafter.shortest
        return [continuation(text, *sizes, min(most, self.drafter.tokens)) for text in checked.texts]


def continuation(text: Sequence[int], longest: int, shortest: int, n: int) -> list[int]:
    """At most n tokens that followed the latest earlier occurrence of the last ``longest`` tokens of a text, or of
    fewer, down to ``shortest``; none where there is no such occurrence."""
    best, at = shortest - 1, 0
    for end in range(len(text) - 1, 0, -1):  # where an earlier occurrence would end
        if text[end - 1] != text[-1]:
            continue
        size = 1
        while size < min(longest, end) and text[end - 1 - size] == text[-1 - size]:
            size += 1
        if size > best:
            best, at = size, end
        if best == longest:
            break
    return list(text[at : at + n]) if at else []


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
