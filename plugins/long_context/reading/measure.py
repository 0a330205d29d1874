"""Measure how well a model reads: right answers at each length and depth, and its loss far into a window."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.initialise import stable_seed
from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, Wording, windows
from blockwright.plugins.long_context.reading.report import Reading
from blockwright.registry import ConfigError

DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
BATCH_TOKENS = 2**14  # tokens of prompts in one forward pass, or one prompt


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Args:
        lengths: tokens of the prompts
        depths: where asked facts stand, from 0 to 1
        samples: prompts at each length and depth
        seed: of all draws; the same for every model, so that models are compared on the same prompts
        generated: whether answers are generated too, not only scored given the right ones before
    """

    lengths: Sequence[int]
    depths: Sequence[float] = DEPTHS
    samples: int = 32
    seed: int = 0
    generated: bool = False


def prompts(test: ReadingTest, length: int, depth: float, text: Text, words: Wording, grid: Grid) -> Iterator[Prompt]:
    """The prompts of one cell of the grid: a function of the seed, the test, the length and the depth."""
    seed = stable_seed(grid.seed, f"{test.name}/{length}/{depth}")
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    for _, window in zip(range(grid.samples), windows(text, length, random), strict=False):
        yield test.prompt(length, depth, window, words, random)


def read(
    decoder: Decoder,
    test: ReadingTest,
    text: Text,
    words: Wording,
    grid: Grid,
    tell: Callable[[str], None] = lambda line: None,
) -> Reading:
    """Run one test.

    Args:
        decoder: in evaluation mode
        test: the test
        text: ids to hide facts in
        words: how facts are written
        grid: what is measured
        tell: called with a line after each length
    """
    depths = list(grid.depths) if test.has_depth else []
    found = Reading(test.name, list(grid.lengths), depths, generated=[] if grid.generated else None)
    for length in grid.lengths:
        cells = [list(prompts(test, length, depth, text, words, grid)) for depth in depths or [0.5]]
        found.teacher_forced.append([_mean(forced_scores(decoder, cell)) for cell in cells])
        if found.generated is not None:
            found.generated.append([_mean(generated_scores(decoder, cell)) for cell in cells])
        tell(f"{test.name} at {length:,} tokens: {found.mean(length):.3f}")
    return found


@torch.no_grad()
def forced_scores(decoder: Decoder, given: Sequence[Prompt]) -> list[float]:
    """For each prompt the share of its answers' tokens that are accepted, given the right ones before.

    Memory is linear in the tokens of a batch: the head is applied to the answers only.
    """
    scores: list[float] = []
    for batch in _batches(given):
        tokens = torch.tensor(
            [prompt.tokens[:-1] for prompt in batch], device=decoder.embedding.weight.device, dtype=torch.int64
        )
        hidden = decoder.hidden(tokens)[0]
        for row, prompt in zip(hidden, batch, strict=True):
            asked = sorted(prompt.accepted)
            likeliest: Tensor = decoder.logits(row[[index - 1 for index in asked]]).argmax(-1)
            right = [i in prompt.accepted[index] for index, i in zip(asked, likeliest.tolist(), strict=True)]
            scores.append(sum(right) / len(right))
    return scores


def generated_scores(decoder: Decoder, given: Sequence[Prompt]) -> list[float]:
    """For each prompt the share of its answers that occur in the text that the model writes instead of them."""
    scores: list[float] = []
    for batch in _batches(given):
        most = max(len(prompt.tokens) - prompt.start for prompt in batch)
        rows = Continuations(decoder, [p.tokens[: p.start] for p in batch], most, Sampling(temperature=0.0))
        written = list(zip(*rows, strict=True))
        for prompt, row in zip(batch, written, strict=True):
            text = [-1 if token is None else token for token in row[: len(prompt.tokens) - prompt.start]]
            scores.append(sum(_occurs(answer, text) for answer in prompt.answers) / len(prompt.answers))
    return scores


def _batches(given: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    rows = max(1, BATCH_TOKENS // max(len(prompt.tokens) for prompt in given))
    for start in range(0, len(given), rows):
        yield given[start : start + rows]


def _occurs(answer: Sequence[int], text: Sequence[int]) -> bool:
    return any(list(text[i : i + len(answer)]) == list(answer) for i in range(len(text) - len(answer) + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


CLASSES = 8  # parts of a window; every scored token is seen in each
FIRST_BIN = 8  # tokens before it are predicted from too little to compare


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in bins of positions that double in size.

    Args:
        edges: position where each bin begins, and the end of the last
        losses: nats per token in each bin
        window: positions that the model has seen in training before an extension
        stretches: the losses of each stretch of the text by itself; ``losses`` is their mean
    """

    edges: list[int]
    losses: list[float]
    window: int
    stretches: list[list[float]] = field(default_factory=list)

    @property
    def slope(self) -> float | None:
        """Nats per token for each doubling of the position beyond the window; above 0, predictions get worse.

        The slope of a least-squares line through the bins from the window on; None of fewer than two bins. All bins
        score the same tokens.
        """
        return self._slope(self.losses)

    @property
    def slope_error(self) -> float | None:
        """Standard error of the slope over stretches, of this model on other text; None for a single stretch, or
        without a slope."""
        slopes = [slope for losses in self.stretches if (slope := self._slope(losses)) is not None]
        return statistics.stdev(slopes) / math.sqrt(len(slopes)) if len(slopes) > 1 else None

    def _slope(self, losses: Sequence[float]) -> float | None:
        starts = zip(self.edges, losses, strict=False)
        pairs = [(math.log2(start), loss) for start, loss in starts if start >= self.window]
        if len(pairs) < 2:
            return None
        x, y = np.array(pairs).T
        return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())

    def as_plain(self) -> dict[str, Any]:
        return {**vars(self), "slope": self.slope, "slope_error": self.slope_error}


@torch.no_grad()
def position_loss(decoder: Decoder, text: Text, length: int, window: int, stretches: int = 4) -> PositionLoss:
    """Measure the loss by position on plain text.

    The same tokens are scored at every distance from the start of a window: windows begin ``length`` / 8 apart, and
    only tokens that lie in a window of each of the 8 shifts count. Windows laid end to end would compare different text
    at different positions, whose losses differ by more than the effect.

    Args:
        decoder: in evaluation mode
        text: token ids
        length: tokens of a window, a multiple of 8
        window: positions that the model was trained on before an extension
        stretches: places of the text that are measured, evenly spaced, of 24 × ``length`` / 8 scored tokens each

    Raises:
        ConfigError: at ``lengths``, for a text shorter than one stretch
    """
    step = length // CLASSES
    n_windows = 4 * CLASSES  # of a stretch: the first and last 7 steps of it are not scored
    size = (n_windows - 1) * step + length + 1
    if len(text) < size:
        rule = f"needs a text of {size:,} tokens to measure the loss by position, and there are {len(text):,}"
        raise ConfigError("lengths", length, rule, "Write shorter lengths, or give the corpus more validation text")
    edges = [FIRST_BIN * 2**i for i in range(int(math.log2(length / FIRST_BIN)) + 1)]
    edges[-1] = length
    found = []
    for first in np.linspace(0, len(text) - size, stretches).astype(int).tolist():
        part = torch.from_numpy(np.asarray(text[first : first + size], dtype=np.int64))
        losses, total, count = _losses(decoder, part.unfold(0, length + 1, step)), np.zeros(length), np.zeros(length)
        for i, row in enumerate(losses):
            # Token number t of the stretch lies at t − i·step here; it is scored where t is in [7 steps, n steps).
            low, high = max((CLASSES - 1) * step - i * step, 0), min(n_windows * step - i * step, length)
            if low < high:
                total[low:high] += row[low:high]
                count[low:high] += 1
        found.append([float(total[a:b].sum() / count[a:b].sum()) for a, b in pairwise(edges)])
    return PositionLoss(edges, np.mean(found, 0).tolist(), window, found)


def window_loss(decoder: Decoder, text: Text, window: int, tokens: int = 2**17) -> float:
    """Mean loss in nats of plain text in windows of ``window`` tokens, laid end to end, over at most ``tokens``."""
    count = min((len(text) - 1) // window, max(1, tokens // window))
    part = torch.from_numpy(np.asarray(text[: count * window + 1], dtype=np.int64))
    return float(np.mean(_losses(decoder, part.unfold(0, window + 1, window))))


@torch.no_grad()
def _losses(decoder: Decoder, rows: Tensor) -> np.ndarray[Any, Any]:
    """Rows of T + 1 tokens → the loss of each token but the first, [rows, T]."""
    found = []
    for batch in rows.split(max(1, BATCH_TOKENS // rows.shape[1])):
        batch = batch.to(decoder.embedding.weight.device)
        hidden = decoder.hidden(batch[:, :-1])[0]
        for states, aim in zip(hidden.split(1), batch[:, 1:].split(1), strict=True):  # logits of one row at a time
            found.append(F.cross_entropy(decoder.logits(states[0]).float(), aim[0], reduction="none").cpu().numpy())
    return np.stack(found)
