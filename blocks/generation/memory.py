"""Continue one text again and again: what a model has read of it stays in its caches.

A conversation grows by turns. Its next prompt usually begins with everything that the caches hold, so that only the new
turn is read. Where it does not, the caches return to the last place that it has in common, or to the start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Mark
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import check_lengths, prefill, usual_chunk
from blockwright.blocks.generation.sample import Draws, Sampling, draw_each
from blockwright.blocks.input import Media
from blockwright.registry import BlockError


@dataclass(frozen=True)
class Place:
    """A place in a text that the caches can return to.

    tokens: before it
    marks: of each cache
    logits: fp32 of the token after it, [1,V]; None at the start
    """

    tokens: Sequence[int]
    marks: Sequence[Mark]
    logits: Tensor | None


class Memory:
    """The caches of one row, and the tokens in them.

    ::

        memory = Memory(decoder, room=4096)
        first = list(memory.continued([5, 3, 8], 20))
        second = list(memory.continued([5, 3, 8, *first, 2], 20))  # reads what follows ``first`` alone

    A text gives the tokens that ``Continuations`` gives with the same room, up to rounding: a token that was
    decoded and one that was read in a prompt are products of other shapes. Texts with media are read from the start:
    equal tokens do not mean equal content. If an exception ends a computation, the next text is read from a place
    before it.

    Args:
        decoder: in evaluation mode
        room: tokens of the longest text, its continuation included
        bits: of the caches, 8, 6 or 4; None for exact ones

    Attributes:
        n_read: tokens of the last text that were read, since the caches did not hold them

    Raises:
        BlockError: unknown ``bits``, or more ``room`` than the model has positions
        NotImplementedError: an attention of this decoder has no ``new_cache``
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, room: int, bits: int | None = None) -> None:
        limit = decoder.position.limit
        if limit is not None and room > limit:
            raise BlockError("room", room, f"the model has positions for {limit}", f"Ask for at most {limit}")
        self.decoder, self.room, self.n_read = decoder, room, 0
        self._caches = decoder.new_caches(1, room, bits)
        self._start = Place((), [cache.mark() for cache in self._caches], None)
        self._prompt = self._start
        self._held: list[int] | None = []  # tokens that the caches hold; None where that is unknown
        self._chunk = usual_chunk(decoder, room)

    def continued(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop_tokens: Collection[int] = (),
        media: Media | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that continue a text, up to a stop token, which is not yielded.

        Args:
            prompt: the whole text
            new_tokens: at most
            sampling, seed, stop_tokens, media: see ``Continuations``

        Raises:
            BlockError: at once, if the prompt is empty, or longer than the room with the new tokens
        """
        check_lengths(self.decoder, [prompt], new_tokens)
        if len(prompt) + new_tokens > self.room:
            rule = f"the prompt and new tokens are {len(prompt) + new_tokens}, and the caches hold {self.room}"
            raise BlockError("new_tokens", new_tokens, rule, "Shorten the prompt, or make more room")
        vocabulary, device = len(self.decoder.output_weight), self.decoder.embedding.weight.device
        draws = Draws.of(sampling or Sampling(), seed, prompt, vocabulary, device)
        return self._tokens(prompt, new_tokens, draws, frozenset(stop_tokens), media)

    def _tokens(
        self, prompt: Sequence[int], new_tokens: int, draws: Draws, stop_tokens: frozenset[int], media: Media | None
    ) -> Iterator[int]:
        logits = self._read_prompt(prompt, media)
        for left in reversed(range(new_tokens)):
            with torch.inference_mode():
                (token,) = draw_each([draws], logits)
            if token in stop_tokens:
                return
            yield token
            if left:
                logits = self._read([token])

    @torch.inference_mode()
    def _read_prompt(self, prompt: Sequence[int], media: Media | None) -> Tensor:
        """The logits after a prompt, of which only what the caches do not hold is read."""
        held = None if media else self._held
        if held is None or len(held) >= len(prompt) or not _begins(prompt, held):
            place = self._start if media or not _begins(prompt, self._prompt.tokens) else self._prompt
            self._held = None
            for cache, mark in zip(self._caches, place.marks, strict=True):
                cache.rewind(mark)
            self._held = list(place.tokens)
            held = list(place.tokens)
        rest = prompt[len(held) :]
        self.n_read = len(rest)
        logits = self._read(rest, media) if rest else self._prompt.logits
        assert logits is not None, "a prompt has a token"
        if media:
            self._prompt, self._held = self._start, None
        else:
            self._prompt = Place(tuple(prompt), [cache.mark() for cache in self._caches], logits)
        return logits

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int], media: Media | None = None) -> Tensor:
        """The logits after some more tokens. Where this is interrupted, it is unknown what the caches hold."""
        held, self._held = self._held, None
        new = torch.tensor([list(tokens)], device=self.decoder.embedding.weight.device, dtype=torch.int64)
        logits = prefill(self.decoder, new, self._caches, self._chunk, media)
        if held is not None:
            held += tokens
            self._held = held
        return logits


def _begins(text: Sequence[int], beginning: Sequence[int]) -> bool:
    return list(text[: len(beginning)]) == list(beginning)
