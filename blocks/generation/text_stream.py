"""Tokens that come one at a time as text that can be shown: no broken characters, nothing of a string that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character yet


class TextStream:
    """The text of one row, as far as it is certain.

    A token may hold a part of a character, and what a token's text is may depend on those before it. So the decoder is
    given the last tokens that made whole characters and all since: what that adds is new. Text is held back while it
    may turn out to be the beginning of a stop.

    Args:
        decode: tokens → text, as a tokenizer does it
        stops: strings that end the text; neither they nor anything behind them is part of it
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, [stop for stop in stops if stop]
        self.ended = False
        self._tokens: list[int] = []
        self._shown, self._read = 0, 0  # tokens from _shown to _read made the last whole characters
        self._held = ""

    def push(self, token: int) -> str:
        """One more token → what it adds to the text, perhaps nothing. ``ended`` says whether that was a stop."""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith(BROKEN):
            return ""
        self._shown, self._read = self._read, len(self._tokens)
        return self._released(new)

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        if self.ended:
            return ""
        new = self._new_text()
        self._shown = self._read = len(self._tokens)
        text = self._released(new) + self._held
        self._held = ""
        return text

    def _new_text(self) -> str:
        """What the tokens since the last whole character add."""
        known = self.decode(self._tokens[self._shown : self._read])
        return self.decode(self._tokens[self._shown :])[len(known) :]

    def _released(self, new: str) -> str:
        text = self._held + new
        found = [place for place in map(text.find, self.stops) if place >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text with which a stop may begin.
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
