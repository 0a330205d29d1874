"""How the tokens of a row are drawn, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from blockwright.blocks.generation.sample import Sampling, sample


class Draws:
    """The draws of a row.

    Args:
        sampling: sampling parameters
        generator: of the row alone
        seen: [V] whether a token occurs in the row, kept up to date; None where nothing depends on it
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator, seen: Tensor | None) -> None:
        self.sampling, self.generator, self.seen = sampling, generator, seen

    @classmethod
    def of(cls, sampling: Sampling, seed: int, text: Collection[int], vocabulary: int, device: torch.device) -> Draws:
        """The draws that continue a text."""
        seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            seen[list(text)] = True
        return cls(sampling, torch.Generator(device).manual_seed(seed), seen)

    def copy(self) -> Draws:
        """The same draws once more, which leave these as they are.

        A token is argmax p_i / e_i, with exponentials e from the generator alone (``sample.draw``). So the copy draws
        the same token from the same logits, and mostly from similar ones: Gumbel coupling (Daliri et al. 2024, arXiv
        2408.07978), by which two distributions at total variation t agree with a probability of at least
        (1 − t) / (1 + t).
        """
        return Draws(self.sampling, self.generator.clone_state(), None if self.seen is None else self.seen.clone())


def draw_each(draws: Sequence[Draws], logits: Tensor) -> list[int]:
    """A token of each row from logits [B,V]: together for rows of equal sampling."""
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(draws):
        groups.setdefault(row.sampling, []).append(i)
    tokens = [0] * len(draws)
    for sampling, members in groups.items():
        some = logits if len(groups) == 1 else logits[members]
        seen = [own for i in members if (own := draws[i].seen) is not None]
        drawn = sample(some, sampling, [draws[i].generator for i in members], torch.stack(seen) if seen else None)
        for i, token in zip(members, drawn.tolist(), strict=True):
            tokens[i] = token
    for row, token in zip(draws, tokens, strict=True):
        if row.seen is not None:
            row.seen[token] = True
    return tokens
