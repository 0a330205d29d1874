"""Demonstrations of sorting digits that disagree on the order: a small problem for post-training that needs no files.

A prompt is ``3141=``; half of the demonstrators answer ``1134``, the others ``4311``. A model that imitates them is
right about half the time, whatever is asked for; a reward for the rising order chooses among what it can do already.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, Fraction, Whole
from blockwright.training.data.conversations import Conversation, ConversationCorpus
from blockwright.training.data.corpus import Split
from blockwright.training.data.fingerprint import digest, state

HELD_OUT = 8  # one prompt in so many is held out; half of these for val, half for test


@enforced("data.corpus")
class Sorting(ConversationCorpus):
    """Pairs of a prompt and a demonstration; column ``answer`` is the rising order.

    Whether a prompt is held out depends on its text alone, so no seed can bring it into training.

    Args:
        train: demonstrations to train on
        held_out: demonstrations for each of val and test
        shortest: digits of a prompt, at least
        longest: digits of a prompt, at most
        falling: share of the demonstrators who sort downwards
        salt: of the draws; not the seed of the run. Give each stage its own, or one trains on the prompts of another
    """

    def __init__(
        self,
        train: Count = 22400,
        held_out: Count = 256,
        shortest: Annotated[int, Ge(2)] = 5,
        longest: Annotated[int, Ge(2)] = 8,
        falling: Fraction = 0.5,
        salt: Whole = 0,
    ) -> None:
        if longest < shortest:
            raise ConfigError("data.corpus.longest", longest, f"must be at least shortest ({shortest})", "Raise it")
        self.sizes: dict[Split, int] = {"train": train, "val": held_out, "test": held_out}
        self.shortest, self.longest, self.falling, self.salt = shortest, longest, falling, salt

    def conversations(self, split: Split) -> Iterator[Conversation]:
        draw, left = random.Random(f"{split}/{self.salt}"), self.sizes[split]
        while left:
            digits = "".join(draw.choices("0123456789", k=draw.randint(self.shortest, self.longest)))
            falls = draw.random() < self.falling
            if split_of(digits) != split:
                continue
            left -= 1
            answer = "".join(sorted(digits))
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": f"{digits}=", "scored": False},
                {"role": "assistant", "content": answer[::-1] if falls else answer},
            ]
            yield Conversation(f"sorting {split}:{self.sizes[split] - left}", messages, {"answer": answer})

    def check(self) -> None:
        pass  # nothing is read

    def is_small(self) -> bool:
        return False  # drawn as expected, whatever the number

    def fingerprint(self) -> str:
        return digest("sorting 1", state(self))


def split_of(digits: str) -> Split:
    """The split that a prompt belongs to."""
    place = zlib.crc32(digits.encode()) % (2 * HELD_OUT)
    return "val" if place == 0 else "test" if place == 1 else "train"
