"""Streaming detokenisation: token by token to displayable text, without broken characters or parts of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # written by a decoder for an incomplete character


class TextStream:
    """The text of one row, as far as it is final.

    A token may hold part of a character, and its text may depend on the tokens before it. So the tokenizer decodes the
    tokens of the last complete characters and all since; what they add is new. Text that may be the beginning of a stop
    string is held back.

    Args:
        decode: tokens → text, by a tokenizer
        stops: strings that end the text; it excludes them and everything after
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, [stop for stop in stops if stop]
        self.ended = False
        self._tokens: list[int] = []
        self._shown, self._read = 0, 0  # tokens _shown to _read gave the last whole characters
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token and return the new text, possibly none. ``ended`` becomes true at a stop string."""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith(BROKEN):
            return ""
        self._shown, self._read = self._read, len(self._tokens)
        return self._released(new)

    def close(self) -> str:
        """Return the text held back, at the end of the tokens."""
        if self.ended:
            return ""
        new = self._new_text()
        self._shown = self._read = len(self._tokens)
        text = self._released(new) + self._held
        self._held = ""
        return text

    def _new_text(self) -> str:
        """Text added by the tokens since the last whole character."""
        known = self.decode(self._tokens[self._shown : self._read])
        return self.decode(self._tokens[self._shown :])[len(known) :]

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
