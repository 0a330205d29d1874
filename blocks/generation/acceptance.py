"""How many drafts were right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Acceptance:
    """Counts of a generation.

    Attributes:
        passes: of the model over a row, each of which gives a token, and the drafts after it that it accepts
        drafted: tokens that were drafted
        accepted: drafts that were the tokens drawn
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, kept: Sequence[int], drafted: Sequence[int]) -> None:
        """A pass over rows, each with the number of tokens that it gave, and of drafts that it checked."""
        self.passes += len(kept)
        self.drafted += sum(drafted)
        self.accepted += sum(kept) - len(kept)

    @property
    def share(self) -> float:
        """Of the drafts, those accepted; 0 where there are none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens of a row for each pass over it; 1 without drafts."""
        return 1 + self.accepted / self.passes if self.passes else 1.0
