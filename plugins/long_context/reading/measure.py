"""Measure how well a model reads: the share of right answers at each length and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.initialise import stable_seed
from blockwright.plugins.long_context.reading.base import Prompt, ReadingTest, Text, Wording, windows
from blockwright.plugins.long_context.reading.reading import Reading

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
