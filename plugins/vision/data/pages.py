"""Pages of handwritten digits, composed on the fly, and questions about them: pictures to train on without files.

Digits are the 1,797 real ones of 8×8 pixels that scikit-learn carries (Alpaydin & Kaynak 1998), divided into splits
before pages are composed: validation and test show handwriting that training has not seen.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockwright.plugins.vision.data.picture_conversations import WORD, Box, Judged, PictureCorpus, boxes, overlap
from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError, require
from blockwright.registry.ranges import Count, Fraction, Whole
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.fingerprint import digest, state

if TYPE_CHECKING:
    from PIL.Image import Image

GRIDS = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2))  # columns × rows of cells
WHOLE: Box = (0.0, 0.0, 999.0, 999.0)
READ, COUNT, WHERE = "read:", "count:", "where {}:"


@enforced("data.corpus")
class Pages(PictureCorpus):
    """Pages of cells, each with a digit or blank, and turns about them.

    *read* is answered with the digits row by row, a space for a blank cell and ``/`` between rows; *count* with their
    number; *where* d, of each digit that the page shows once, with its box, ``[[x1, y1, x2, y2]]`` in thousandths of
    the page as in DeepSeek-VL2.

    Args:
        train: pages to train on
        held_out: pages for each of val and test
        cell: pixels a side of a cell; a tile of the tower, for pages that use its tiles
        blank: share of the cells without a digit, on pages of several
        single: share of the training pages with one cell and *read* alone, the easiest
        where: share of the pages that ask *where* too, for each digit that they show once
        salt: of the draws; not the seed of the run
    """

    def __init__(
        self,
        train: Count = 20000,
        held_out: Count = 256,
        cell: Count = 28,
        blank: Fraction = 0.2,
        single: Fraction = 0.5,
        where: Fraction = 0.0,
        salt: Whole = 0,
    ) -> None:
        self.sizes: dict[Split, int] = {"train": train, "val": held_out, "test": held_out}
        self.cell, self.blank, self.single, self.where, self.salt = cell, blank, single, where, salt

    def conversations(self, split: Split) -> Iterator[Conversation]:
        for n in range(self.sizes[split]):
            yield self._page(split, n)

    def pictures(self, conversation: Conversation) -> list[Image]:
        from PIL import Image

        columns, rows = conversation.columns["grid"]
        page = np.zeros((rows * self.cell, columns * self.cell), dtype=np.uint8)
        for sample, (x1, y1, x2, y2) in conversation.columns["digits"]:
            digit = Image.fromarray(self._images[sample]).resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)
            page[y1:y2, x1:x2] = np.asarray(digit)
        return [Image.fromarray(255 - page).convert("RGB")]

    def judge(self, conversation: Conversation, question: str, answer: str, truth: str) -> Judged:
        """Of *read* whether all is right and the share of digits that are right in their places, of *count* whether it
        is right, of *where* whether the box overlaps the true one by half of their union, and by how much. Beside it,
        ``constant``: whether the box does that is right most often on pages of this size."""
        kind = question.removeprefix(WORD).split()[0].rstrip(":")
        figures = {"exact": float(answer == truth)}
        if kind == "where":
            true = boxes(truth)[0]
            shared = max((overlap(box, true) for box in boxes(answer)[:1]), default=0.0)
            figures = {"found": float(shared >= 0.5), "overlap": shared}
            figures["constant"] = float(overlap(self._constant.get(_size(conversation), WHOLE), true) >= 0.5)
        elif kind == "read" and (digits := [i for i, letter in enumerate(truth) if letter.isdigit()]):
            figures["digits"] = sum(answer[i : i + 1] == truth[i] for i in digits) / len(digits)
        return Judged(kind, _size(conversation), figures)

    def check(self) -> None:
        require("vision", "PIL", "sklearn", path="data.corpus", otherwise="or use pictures of your own: data=images")
        if self.cell < 12:
            raise ConfigError(
                "data.corpus.cell", self.cell, "must hold a digit of 8 pixels, jittered", "Use 12 or more"
            )

    def is_small(self) -> bool:
        return False  # drawn as expected, whatever the number

    def fingerprint(self) -> str:
        return digest("pages 2", state(self))

    def _page(self, split: Split, n: int) -> Conversation:
        draw = random.Random(f"{split}/{n}/{self.salt}")
        single = split == "train" and draw.random() < self.single
        columns, rows = GRIDS[0] if single else draw.choice(GRIDS)
        samples, text, digits = self._of(split), [], []
        for row in range(rows):
            for column in range(columns):
                if rows * columns > 1 and draw.random() < self.blank:
                    text.append(" ")
                    continue
                sample = draw.choice(samples)
                text.append(str(self._labels[sample]))
                digits.append((sample, self._box(draw, column, row)))
        lines = ["".join(text[columns * row : columns * (row + 1)]) for row in range(rows)]
        turns = [(READ, "/".join(lines))] + ([] if single else [(COUNT, str(len(digits)))])
        unique = [(s, box) for s, box in digits if text.count(str(self._labels[s])) == 1]
        if not single and draw.random() < self.where:
            sizes = (columns * self.cell, rows * self.cell) * 2
            for sample, box in draw.sample(unique, len(unique)):
                corners = ", ".join(str(999 * at // size) for at, size in zip(box, sizes, strict=True))
                turns.append((WHERE.format(self._labels[sample]), f"[[{corners}]]"))
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages[0]["content"] = WORD + messages[0]["content"]
        return Conversation(f"pages {split}:{n}", messages, {"grid": [columns, rows], "digits": digits})

    def _box(self, draw: random.Random, column: int, row: int) -> tuple[int, int, int, int]:
        side = draw.randint(self.cell * 5 // 8, self.cell * 7 // 8)
        x, y = (at * self.cell + draw.randint(0, self.cell - side) for at in (column, row))
        return x, y, x + side, y + side

    @cached_property
    def _constant(self) -> dict[str, Box]:
        """Size of a page → of the boxes on such training pages, the one that answers most of their questions."""
        asked = Pages(min(self.sizes["train"], 1000), 1, self.cell, self.blank, 0.0, 1.0, self.salt)
        known: dict[str, list[Box]] = defaultdict(list)
        for page in asked.conversations("train"):
            known[_size(page)] += [box for turn in page.messages for box in boxes(turn["content"])]
        return {size: max(found, key=partial(_answered, questions=found)) for size, found in known.items() if found}

    def _of(self, split: Split) -> list[int]:
        """The digits of a split: 80 % for train, the rest for val and test."""
        which = SPLITS.index(split)
        return self._samples[which]

    @cached_property
    def _samples(self) -> list[list[int]]:
        order = list(range(len(self._labels)))
        random.Random(0).shuffle(order)
        n = len(order) // 10
        return [order[2 * n :], order[:n], order[n : 2 * n]]

    @property
    def _labels(self) -> npt.NDArray[np.int64]:
        return self._digits[1]

    @property
    def _images(self) -> npt.NDArray[np.uint8]:
        return self._digits[0]

    @cached_property
    def _digits(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        from sklearn.datasets import load_digits

        found = load_digits()
        return (found.images * 255 / 16).astype(np.uint8), found.target


def _size(page: Conversation) -> str:
    return "×".join(map(str, page.columns["grid"]))


def _answered(box: Box, questions: list[Box]) -> int:
    """How many questions a box answers, by what their answers are."""
    return sum(overlap(box, true) >= 0.5 for true in questions)
