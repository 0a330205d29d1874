"""The coordinate check: how sizes of activations, and of their changes by training, grow with the width of a decoder.

Yang et al. 2022, arXiv 2203.03466, appendix D.1. A decoder is trained for a few steps on one batch at several widths.
For each kind of activation the slope of log mean |a|, and of log mean |change of a|, against log width is fitted. Under
rules of maximal update the slopes of changes are 0, but for noise; under standard parametrisation they are positive,
and the best rate falls with the width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.base import Block
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.largest_score import LargestScores
from blockwright.blocks.layer import Layer

LOGITS = "logits"
SUCCESSORS = 4  # of a token in the text: enough to learn in a few steps, too many to overfit


class Size(NamedTuple):
    """Means over an activation: its absolute value before training, and the absolute change by it."""

    initial: float
    change: float


class Slope(NamedTuple):
    """Slopes of log size against log width."""

    initial: float
    change: float


def text(rows: int, length: int, vocabulary: int, seed: int) -> Tensor:
    """[B,T+1] tokens by Zipf's law of which each has a few successors, as in text: drawn, so that no data is needed."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float32)
    drawn = torch.multinomial(frequency, vocabulary * SUCCESSORS + rows, replacement=True, generator=generator)
    successors = drawn[rows:].view(vocabulary, SUCCESSORS)
    choices = torch.randint(SUCCESSORS, (length, rows), generator=generator)
    tokens = [drawn[:rows]]
    for choice in choices:
        tokens.append(successors[tokens[-1], choice])
    return torch.stack(tokens, 1)


def measure(decoder: Decoder, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int) -> dict[str, Size]:
    """Train a decoder on one batch, and compare its activations on it before and after.

    Args:
        decoder: trained in place
        optimizer: of its weights
        tokens: [B,T+1]
        steps: of the optimizer

    Returns:
        kind of activation → its size; ``layers.*.attention.query`` is the mean over the layers
    """
    before = activations(decoder, tokens[:, :-1])
    for _ in range(steps):
        loss = F.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = activations(decoder, tokens[:, :-1])
    sizes: dict[str, list[Size]] = {}
    for name, start in before.items():
        size = Size(start.abs().mean().item(), (after[name] - start).abs().mean().item())
        sizes.setdefault(kind_of(name), []).append(size)
    return {kind: Size(*(sum(column) / len(column) for column in zip(*of, strict=True))) for kind, of in sizes.items()}


def kind_of(name: str) -> str:
    """The name of an activation without the number of its layer."""
    return re.sub(r"^(layers|mtp)\.\d+", r"\1.*", name)


def activations(decoder: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Name of a linear layer, embedding, block or layer → what it returns for tokens [B,T]; the largest attention score
    of each head, and the logits."""
    attentions = {name: m for name, m in decoder.named_modules() if isinstance(m, Attention) and m.score_rows()}
    scores = {f"{name}.scores": LargestScores(attention) for name, attention in attentions.items()}
    with _recorded(decoder) as found:
        logits = decoder(tokens).detach().float()  # with a graph: scores are noted in such passes only
    decoder.choose_kernels()
    noted = {name: largest.take() for name, largest in scores.items()}
    return {**found, **{name: each for name, each in noted.items() if each is not None}, LOGITS: logits}


@contextmanager
def _recorded(decoder: Decoder) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def record(name: str, got: Any) -> None:
        got = got[0] if isinstance(got, tuple) else got
        if isinstance(got, Tensor) and got.is_floating_point():
            found[name] = got.detach().float().clone()

    handles = [
        module.register_forward_hook(lambda _module, _given, got, name=name: record(name, got))
        for name, module in decoder.named_modules()
        if name and name != "head" and isinstance(module, nn.Linear | nn.Embedding | Block | Layer)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def slopes(widths: Sequence[int], measured: Sequence[Mapping[str, Size]]) -> dict[str, Slope]:
    """Kind of activation → slopes over the widths; kinds that stay at 0 are left out.

    Args:
        widths: of the decoders
        measured: the sizes at each, in the same order; several of one width are averaged
    """
    found = {}
    for kind in measured[0]:
        sizes = [one[kind] for one in measured]
        if all(size.initial > 0 and size.change > 0 for size in sizes):
            columns = zip(*sizes, strict=True)
            found[kind] = Slope(*(_slope(widths, column) for column in columns))
    return found


def _slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The least-squares slope of log mean size against log width."""
    means = {w: sum(s for v, s in zip(widths, sizes, strict=True) if v == w) / widths.count(w) for w in set(widths)}
    x, y = [math.log(w) for w in means], [math.log(size) for size in means.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
