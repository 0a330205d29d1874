"""Changes to training windows: positions that skip, and strings that occur again later, to recall."""

from __future__ import annotations

import numpy as np

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import BelowOne, Count, Share, Whole
from blockwright.training.data.windows import Array, Transform

POSE = "data.transforms.pose"


@enforced(POSE)
class PoSE(Transform):
    """Positional skip-wise training: a window of T tokens is cut into chunks, whose positions skip ahead.

    Zhu et al. 2023, arXiv 2309.10400: chunk i keeps its tokens and gets positions t + u_i, 0 = u_0 ≤ u_1 ≤ …, each u
    uniform between the one before and ``target`` − T. Cuts and skips are drawn for each window, so all distances up to
    ``target`` occur while attention costs T² only.

    Documents that are kept apart within a window keep their own zero: the skip of a later chunk is added to positions
    that count from the start of their document. The released code also skips at the start of the first chunk, which
    changes nothing under rotary positions.

    Args:
        target: positions of the extended model, in tokens
        chunks: pieces of a window; 2 in the paper
        margin: least length of a chunk, as a fraction of the window divided by ``chunks``
    """

    def __init__(self, target: Count, chunks: Count = 2, margin: BelowOne = 0.25) -> None:
        self.target, self.chunks, self.margin = target, chunks, margin
        if chunks < 2:
            raise ConfigError(f"{POSE}.chunks", chunks, "positions skip between chunks", "Write 2 or more")

    def check(self, sequence_length: int, vocab_size: int) -> None:
        """Refuse a target shorter than a window, and windows that cannot be cut."""
        if self.target < sequence_length:
            rule = f"is shorter than a window (data.sequence_length = {sequence_length})"
            raise ConfigError(f"{POSE}.target", self.target, rule, "Name the length to extend to, or shorten windows")
        if self.chunks > sequence_length:
            rule = f"is more than a window has tokens (data.sequence_length = {sequence_length})"
            raise ConfigError(f"{POSE}.chunks", self.chunks, rule, "Write 2, as the paper")

    def reach(self, sequence_length: int) -> int:
        """``target``."""
        return max(self.target, sequence_length)

    def __call__(self, window: dict[str, Array], random: np.random.RandomState) -> None:
        """Shift the positions of every chunk but the first."""
        positions = window["positions"]
        length = len(positions)
        least = int(self.margin * length / self.chunks)
        free = length - least * self.chunks
        cuts = np.sort(random.randint(0, free + 1, size=self.chunks - 1)) + least * np.arange(1, self.chunks)
        skips = np.sort(random.randint(0, self.target - length + 1, size=self.chunks - 1))
        for cut, more in zip(cuts, np.diff(skips, prepend=0), strict=True):
            positions[cut:] += more


RECALL = "data.transforms.recall"


@enforced(RECALL)
class Recall(Transform):
    """Overwrites parts of the text with strings of random symbols, each of which occurs ``times`` times.

    Plain text alone hardly teaches a small model to look back: its next tokens follow from the last few. A repeated
    random string is predictable from its second symbol on, and only from its earlier occurrence (induction), so that a
    model of a few layers learns to find a string at any distance, which the reading tests then measure.

    Strings never lie on a grid: on a grid a model learns to copy from fixed distances, and finds nothing elsewhere.
    Without ``text_weight`` below 1 the text, of which there is ten times more, drowns these few targets. A repetition
    that stands in another document than the first occurrence cannot be recalled, and keeps the weight of text.

    Args:
        length: symbols of a string
        every: tokens of text for each string: a window of T has max(2, T // every) strings
        times: occurrences of a string
        symbols: the symbols are the ids from the first of these numbers up to, without, the second: ids that the text
            does not use. The default are bytes that no ASCII text has
        share: of the windows that have strings; the others stay plain text, which a model of strings alone unlearns
        text_weight: weight of all other targets in the training loss; recalled ones have weight 1
    """

    def __init__(
        self,
        length: Count = 8,
        every: Count = 32,
        times: Count = 2,
        symbols: tuple[Whole, Whole] = (128, 256),
        share: Share = 1.0,
        text_weight: Share = 0.1,
    ) -> None:
        self.share = share
        self.length, self.every, self.times, self.text_weight = length, every, times, text_weight
        if len(symbols) != 2 or not 0 <= symbols[0] < symbols[1] - 1:
            rule = "must be the first id and the one after the last, at least two"
            raise ConfigError(f"{RECALL}.symbols", list(symbols), rule, "Write [128,256]")
        self.symbols = (int(symbols[0]), int(symbols[1]))
        if length < 2:
            raise ConfigError(f"{RECALL}.length", length, "the second symbol is the first to recall", "Write 8")
        if times < 2:
            raise ConfigError(f"{RECALL}.times", times, "a string is recalled where it occurs again", "Write 2")

    @property
    def room(self) -> int:
        """Tokens of the slot in which a string lies, at a random place."""
        return self.length + self.length // 2

    def check(self, sequence_length: int, vocab_size: int) -> None:
        """Refuse strings that a window cannot hold, and symbols that are no ids."""
        if self.symbols[1] > vocab_size:
            rule = f"goes beyond the tokenizer's ids (data.tokenizer.vocab_size = {vocab_size})"
            raise ConfigError(f"{RECALL}.symbols", list(self.symbols), rule, f"End at {vocab_size} or less")
        if self.strings(sequence_length) * self.times > self.slots(sequence_length):
            rule = (
                f"needs {self.strings(sequence_length) * self.times} places of {self.room} tokens, more than a window "
                f"has (data.sequence_length = {sequence_length})"
            )
            raise ConfigError(f"{RECALL}.every", self.every, rule, "Raise it, shorten the strings, or lengthen windows")

    def strings(self, length: int) -> int:
        """Different strings in a window of ``length`` tokens."""
        return max(2, length // self.every)

    def slots(self, length: int) -> int:
        """Places for strings in a window of ``length`` tokens: the first token stays, since nothing predicts it."""
        return (length - 1) // self.room

    def __call__(self, window: dict[str, Array], random: np.random.RandomState) -> None:
        """Write the strings, and weigh the targets."""
        size = len(window["tokens"])
        window["weights"][:] = self.text_weight
        if random.random_sample() >= self.share:
            return
        chosen = random.permutation(self.slots(size))[: self.strings(size) * self.times].reshape(-1, self.times)
        places = 1 + np.sort(chosen, axis=1) * self.room + random.randint(0, self.room - self.length + 1, chosen.shape)
        for row in places:
            string = random.randint(*self.symbols, size=self.length)
            for number, place in enumerate(row.tolist()):
                self._write(window, string, place, int(row[0]) if number else None)

    def _write(self, window: dict[str, Array], string: Array, place: int, first: int | None) -> None:
        """Write one occurrence; ``first`` is where the first one stands, None for itself."""
        end = place + self.length
        window["tokens"][place:end] = string
        before = window["targets"][place - 1 : end - 1]
        before[before != IGNORED] = string[before != IGNORED]
        segments = window["segments"]
        if first is not None and segments[first] == segments[first + self.length - 1] == segments[place]:
            window["weights"][place : end - 1] = np.where(
                segments[place + 1 : end] == segments[place], 1.0, self.text_weight
            )
