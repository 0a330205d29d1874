"""Streaming detokenisation: token by token to displayable text, without broken characters or parts of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
