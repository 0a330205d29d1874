"""Continue prompts: prefill the caches, then decode token by token, and show the tokens as text.

``generate`` is the simple case, prompts of equal length in a tensor. ``Continuations`` takes prompts of any length and
yields tokens as they are sampled; ``TextStream`` makes them text without broken characters or parts of a stop string.
Requests that come and go are for ``Batch`` (blocks/generation/batch.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Draws, Sampling, draw_each
from blockwright.blocks.input import Media
from blockwright.blocks.selector.base import Selector
from blockwright.registry import BlockError

CHUNK = 8192  # prompt tokens per forward pass
SCORES = 2**24  # upper bound of the materialised mask of padded rows, or of what a selector chooses


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Sample continuations of prompts of equal length.

    Args:
        decoder: in evaluation mode
        prompt: [B,T] int64, T ≥ 1
        new_tokens: how many to add
        temperature, top_k: see ``Sampling``
        seed: of the draws; row i draws from seed + i

    Returns:
        [B,T + new_tokens]
    """
    rows = Continuations(decoder, prompt.tolist(), new_tokens, Sampling(temperature, top_k), seed=seed)
    steps = [prompt.new_tensor(tokens)[:, None] for tokens in rows]
    return torch.cat([prompt, *steps], 1)


class Continuations:
    """A batch of rows continued token by token: an iterator over each row's new token, None for rows that have ended.

    ::

        for tokens in Continuations(decoder, [[5, 3], [7]], 20, stop_tokens={0}):
            ...  # [17, 4], then [2, None], …

    Rows of unequal length are padded on the left (see blocks/cache), and give what each gives alone. Each row has
    its own random generator, so its draws do not depend on the others. Ended rows are computed until the last one ends.

    Args:
        decoder: in evaluation mode
        prompts: token ids of each row, at least one
        new_tokens: how many to add to each at most
        sampling: sampling parameters
        seed: row i draws from seed + i
        stop_tokens: tokens that end a row; not returned
        bits: of the caches, 8, 6 or 4; None for exact ones
        chunk: prompt tokens per forward pass: smaller chunks of long prompts take less memory. None for 8192, fewer
            where padding is masked or a selector chooses
        media: what all prompts hold beside text, in order; each has its places in a prompt
        room: tokens that each row is declared to have, which some rotations depend on; None: those that it needs

    Raises:
        BlockError: a prompt is empty, or longer than the model's positions
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop_tokens: Collection[int] = (),
        bits: int | None = None,
        chunk: int | None = None,
        media: Media | None = None,
        room: int | None = None,
    ) -> None:
        check_lengths(decoder, prompts, new_tokens)
        device = decoder.embedding.weight.device
        longest = max(map(len, prompts))
        # By a token of its own: padding is computed, and hidden numbers that are not finite reach what is not.
        of_media = {block.token for block in decoder.inputs.values()}
        before = [next((token for token in row if token not in of_media), 0) for row in prompts]
        padded = [[first] * (longest - len(row)) + [*row] for first, row in zip(before, prompts, strict=True)]
        self.decoder, self.sampling = decoder, sampling or Sampling()
        self.stop_tokens, self.left = frozenset(stop_tokens), new_tokens
        self.ended = [False] * len(prompts)
        self._pending, self._media = torch.tensor(padded, device=device, dtype=torch.int64), media
        vocabulary = len(decoder.output_weight)
        self._draws = [Draws.of(self.sampling, seed + i, row, vocabulary, device) for i, row in enumerate(prompts)]
        unequal = any(len(row) != longest for row in prompts)
        self.chunk = chunk or usual_chunk(decoder, len(prompts) * longest, unequal)
        padding = (
            torch.tensor([longest - len(row) for row in prompts], device=device, dtype=torch.int64) if unequal else None
        )
        # The last token is returned and never read.
        self._caches = decoder.new_caches(len(prompts), room or max(longest + new_tokens - 1, 1), bits, padding)
        if padding is not None and room is None:
            for cache in self._caches:
                cache.declared = longest + new_tokens - 1 - padding

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    @torch.inference_mode()
    def __next__(self) -> list[int | None]:
        if self.left <= 0 or all(self.ended):
            raise StopIteration
        self.left -= 1
        logits = prefill(self.decoder, self._pending, self._caches, self.chunk, self._media)
        self._media = None
        running = [i for i, over in enumerate(self.ended) if not over]
        some = logits if len(running) == len(logits) else logits[running]
        tokens = self._pending[:, -1].tolist()  # rows that have ended read their last token again
        for i, token in zip(running, draw_each([self._draws[i] for i in running], some), strict=True):
            tokens[i] = token
        self._pending = torch.tensor(tokens, device=logits.device, dtype=torch.int64)[:, None]
        self.ended = [over or token in self.stop_tokens for over, token in zip(self.ended, tokens, strict=True)]
        if all(self.ended):
            raise StopIteration
        return [None if over else token for over, token in zip(self.ended, tokens, strict=True)]

    def end(self, row: int) -> None:
        """Stop a row whose text has ended."""
        self.ended[row] = True


def prefill(
    decoder: Decoder,
    tokens: Tensor,
    caches: Sequence[Cache],
    chunk: int = CHUNK,
    media: Media | None = None,
) -> Tensor:
    """Feed tokens [B,T], with media at their places, into the caches in chunks → fp32 logits for the token after the
    last, [B,V].

    The head is applied to the last token only: logits of a long prompt would be larger than everything else. Of the
    others the last layer computes what its cache remembers. Media are embedded before the prompt is split.
    """
    for part, x in _parts(decoder, tokens, chunk, media):
        hidden = decoder.last_hidden(part, caches, x)
    return decoder.logits(hidden[:, -1]).float()


def read(
    decoder: Decoder,
    tokens: Tensor,
    caches: Sequence[Cache],
    chunk: int = CHUNK,
    media: Media | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """``prefill`` that also returns the experts chosen for the tokens, [B,T,k], of each layer that routes."""
    chosen: list[list[Tensor]] = []
    for part, x in _parts(decoder, tokens, chunk, media):
        hidden, routings = decoder.hidden(part, caches=caches, embedded=x)
        chosen.append([r.experts.unflatten(0, part.shape) for r in routings if r is not None])
    return decoder.logits(hidden[:, -1]).float(), [torch.cat(layer, 1) for layer in zip(*chosen, strict=True)]


def _parts(decoder: Decoder, tokens: Tensor, chunk: int, media: Media | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some tokens of a prompt at a time, and their embeddings where there are media."""
    embedded = decoder.look_up(tokens, media).split(chunk, 1) if media else [None]
    return zip(tokens.split(chunk, 1), itertools.cycle(embedded))


def usual_chunk(decoder: Decoder, n_tokens: int, padded: bool = False) -> int:
    """Prompt tokens per forward pass: fewer for long prompts where padding is masked or a selector chooses.

    Args:
        decoder: the model
        n_tokens: of all rows, once the prompts are read
        padded: whether rows have padding
    """
    if padded or any(isinstance(part, Selector) for part in decoder.modules()):
        return max(64, min(CHUNK, SCORES // n_tokens))
    return CHUNK


def check_lengths(decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Refuse prompts that cannot be continued, before anything is computed.

    Raises:
        BlockError: no prompts, an empty one, or more tokens than there are positions
    """
    if not prompts or not all(map(len, prompts)):
        rule = "a model continues at least one token"
        raise BlockError("prompt", "", rule, "Write a prompt, or begin with the token that ends a document")
    if new_tokens < 0:
        raise BlockError("new_tokens", new_tokens, "must be at least 0", "Write 0 or more")
    total, limit = max(map(len, prompts)) + new_tokens, decoder.position.limit
    if limit is not None and total > limit:
        rule = f"the prompt and new tokens are {total}, and the model has positions for {limit}"
        room = limit - total + new_tokens
        remedy = f"Ask for at most {room}" if room > 0 else f"Shorten the prompt to {limit - 1} tokens or fewer"
        raise BlockError("new_tokens", new_tokens, rule, remedy)


BROKEN = "\ufffd"  # written by a decoder for an incomplete character
PARTS = 3  # tokens at most that an incomplete character of UTF-8 is spread over
LONGEST = 8  # tokens that are decoded together while none ends with a whole character


class TextStream:
    """The text of one row, as far as it is final.

    A token may hold part of a character, or parts of two, and its text may depend on the tokens before it. So the
    tokenizer decodes some of the last tokens together, and what is longer than before is new. What is broken is held
    back until it is whole, or for three tokens: then no further one can complete it. Text that may be the beginning of
    a stop string is held back too.

    All pieces together are the text that the tokenizer gives for all tokens, if no U+FFFD is in it. Where bytes are no
    UTF-8, both have U+FFFD, but not always as many. The work for a token does not grow with the text.

    Args:
        decode: tokens → text, by a tokenizer
        stops: strings that end the text; it excludes them and everything after
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, [stop for stop in stops if stop]
        self.ended = False
        self._tokens: list[int] = []  # the last ones
        self._text, self._given = "", 0  # their text, and how many of its characters have been returned
        self._since = 0  # tokens since the last whole character
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token and return the new text, possibly none. ``ended`` becomes true at a stop string."""
        tokens = [*self._tokens, token]
        text = self.decode(tokens)
        if text == self._text and (text or token in self._tokens) and not self.decode([token]):
            return ""  # a special token: it has no text, and is not counted among those that complete a character
        if text.endswith(BROKEN):
            self._since += 1
            new = self._whole_part(tokens, text)
        else:
            new = text[self._given :]
            # What the next token's text may depend on: those of the last text, as a blank in front may be dropped.
            self._tokens = tokens[-1 - self._since :] if new else tokens[-LONGEST:]
            self._text, self._since = self.decode(self._tokens), 0
            self._given = len(self._text)
        return self._released(new)

    def _whole_part(self, tokens: list[int], text: str) -> str:
        """What is new and final of a text that ends broken."""
        final = max(self._given, len(text.rstrip(BROKEN)))
        if self._since > PARTS and text.startswith(before := self.decode(tokens[:-PARTS])):
            final = max(final, len(before))
        new, left = text[self._given : final], text[final:]
        if len(tokens) > LONGEST:
            tokens = tokens[-1 - PARTS :]
            shorter = self.decode(tokens)
            if not shorter.endswith(left):  # by no rule: it is taken as it is
                new, left = new + left, ""
            text = shorter
        self._tokens, self._text, self._given = tokens, text, len(text) - len(left)
        return new

    def close(self) -> str:
        """Return the text held back, at the end of the tokens."""
        if self.ended:
            return ""
        new, self._given = self._text[self._given :], len(self._text)
        text = self._released(new) + self._held
        self._held = ""
        return text

    def _released(self, new: str) -> str:
        text = self._held + new
        found = [place for place in map(text.find, self.stops) if place >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        # The longest suffix of the text that begins a stop string.
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
