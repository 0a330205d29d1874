"""Drafts by the text of the row itself: what followed the last time that it read so."""

from __future__ import annotations

from collections.abc import Sequence

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.drafts.base import Checked, Drafter, Drafts, check_tokens
from blockwright.blocks.generation.sample import Draws
from blockwright.registry import BlockError


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
