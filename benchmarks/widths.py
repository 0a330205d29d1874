"""The best rate of a small dense decoder at widths 64 and 256, with and without rules of width, in one process.

    python -m benchmarks.widths muon|adamw [SEED]

70 steps of 4 × 128 bytes of Shakespeare, five rates an octave apart on one seed, the vertex (lab/statistics/tuning.py),
and one more run there. `blockwright transfer` is the same experiment with fresh seeds and a process for each run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.lab.statistics.tuning import Try, fit
from blockwright.training.data.corpora import Shakespeare
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.matrices import Muon
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parametrisations import Width

STEPS, LENGTH, ROWS, WARMUP = 70, 128, 4, 1
BASE = {"d_model": 64, "attention": {"n_heads": 4}, "ffn": {"d_ff": 256}}
MIDDLE = {"muon": 0.06, "adamw": 0.01}  # of the rates at the base
RECIPES: dict[str, type[OptimizerRecipe]] = {"muon": Muon, "adamw": AdamW}


@cache
def split(name: str) -> NDArray[np.uint8]:
    return np.frombuffer("".join(Shakespeare().documents(name)).encode(), dtype=np.uint8)  # type: ignore[arg-type]


def batches(seed: int) -> Iterator[Tensor]:
    """[B,T+1] bytes: windows in an order of the seed."""
    text, random = split("train"), np.random.default_rng(seed)
    first, order = random.integers(len(text)), random.permutation(len(text) // LENGTH - 1)
    for i in range(0, len(order), ROWS):
        starts = (first + order[i : i + ROWS] * LENGTH) % (len(text) - LENGTH - 1)
        yield torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int64))


def model(width: int) -> Decoder:
    plain = {key: value for key, value in preset("tiny").items() if key not in ("layout", "variants")}
    sizes = {"attention": {"name": "mha", "n_heads": width // 16}, "ffn": {"name": "swiglu", "d_ff": 4 * width}}
    return compose({**plain, **sizes, "vocab_size": 256, "d_model": width, "n_layers": 2}, device="meta")


def loss_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    return F.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def factor(step: int) -> float:
    """Of a cosine to a tenth."""
    done = (step + 1 - WARMUP) / (STEPS - WARMUP)
    return 1.0 if step < WARMUP else 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(width: int, rules: bool, recipe: OptimizerRecipe, seed: int) -> float:
    """Validation loss in nats a byte."""
    config = model(width).config
    recipe = recipe.scaled(Width(BASE, config).scales(recipe)) if rules else recipe
    decoder = compose(config, seed=seed, scales=recipe.scales)
    optimizer = recipe.build(decoder)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, tokens in zip(range(STEPS), batches(seed), strict=False):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        optimizer.zero_grad()
        loss_of(decoder, tokens).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    text = split("val")
    starts = np.linspace(0, (len(text) - 1) // LENGTH - 1, 64).astype(int) * LENGTH
    held_out = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
    with torch.no_grad():
        loss = loss_of(decoder, held_out).item()
    return loss if math.isfinite(loss) else math.inf


def main(name: str, seed: int = 0) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    print("| model | best rate | loss there | tries |\n|---|---:|---:|---|")
    for width, rules in ((64, False), (256, True), (256, False)):
        middle = MIDDLE[name] / (1 if rules or width == 64 else 4)
        rates = [middle * 2.0**i for i in range(-2, 3)]
        tries = [Try(rate, train(width, rules, RECIPES[name](lr=rate), seed)) for rate in rates]  # type: ignore[call-arg]
        best = fit(tries).vertex
        loss = train(width, rules, RECIPES[name](lr=best), seed)  # type: ignore[call-arg]
        shown = ", ".join(f"{each.value:.4g}: {each.loss:.3f}" for each in tries)
        print(f"| {width}, {'rules' if rules else 'standard'} | {best:.4f} | {loss:.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
