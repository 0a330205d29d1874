"""Sample completions from the model that is trained, with the log-probability of every token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blocks.decoder import Decoder
from blocks.generation.generate import check_lengths, prefill
from blocks.generation.sample import Sampling, sample
from training.data.rows import best_fit


@dataclass
class Rollout:
    """Completions of prompts, as plain lists: nothing of sampling reaches the loss.

    Args:
        prompts: ids of the prompt of each completion
        completions: ids, with the one that ends it if it has ended
        sampler: log-probability of each, as sampled
        ended: whether each ended by itself
        advantage: of each; NaN before it is judged
        old: log-probability of each token as the trainer computes it, where several updates need it
        figures: sums of what is logged, by name
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    sampler: list[list[float]]
    ended: list[bool]
    advantage: list[float] = field(default_factory=list)
    old: list[list[float]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, rows: Sequence[int]) -> Rollout:
        """Some of the completions."""
        lists = ("prompts", "completions", "sampler", "ended", "advantage", "old")
        taken: dict[str, Any] = {name: [getattr(self, name)[i] for i in rows if getattr(self, name)] for name in lists}
        return Rollout(**taken)


@torch.no_grad()
def sample_completions(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    new_tokens: int,
    temperature: float,
    ends: Collection[int],
    to_the_limit: bool = False,
) -> Rollout:
    """Continue prompts until they end.

    Under ``no_grad``, not ``inference_mode``: a sharded model whose first forward pass is in inference mode cannot be
    trained afterwards.

    Args:
        decoder: in evaluation mode
        prompts: ids of each row, at least one
        seeds: of the draws of each row, which depend on nothing else
        new_tokens: of a completion, at most
        temperature: divides the logits; 0 takes the likeliest token
        ends: tokens that end a completion
        to_the_limit: take ``new_tokens`` steps even if all rows have ended, for ranks that must take equally many
    """
    check_lengths(decoder, prompts, new_tokens)
    device = decoder.embedding.weight.device
    longest = max(map(len, prompts))
    missing = [longest - len(row) for row in prompts]
    padding = torch.tensor(missing, device=device) if any(missing) else None
    pending = torch.tensor([[0] * n + list(row) for n, row in zip(missing, prompts, strict=True)], device=device)
    caches = decoder.new_caches(len(prompts), max(longest + new_tokens - 1, 1), None, padding)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    found = Rollout(
        [list(row) for row in prompts], [[] for _ in prompts], [[] for _ in prompts], [False] * len(prompts)
    )
    sampling = Sampling(temperature)
    for _ in range(new_tokens):
        logits = prefill(decoder, pending, caches)
        drawn = sample(logits, sampling, generators)
        logp = log_probabilities(logits, drawn, temperature).tolist()
        for row, token in enumerate(drawn.tolist()):
            if not found.ended[row]:
                found.completions[row].append(token)
                found.sampler[row].append(logp[row])
                found.ended[row] = token in ends
        if all(found.ended) and not to_the_limit:
            break
        pending = drawn[:, None]
    return found


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability in fp32 of tokens [...] under logits [...,V] at a temperature; of 1 where that is 0."""
    scaled = logits.float() / (temperature or 1.0)
    return scaled.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def score(decoder: Decoder, rollout: Rollout, temperature: float) -> tuple[Tensor, list[Any]]:
    """Log-probability of each completion's tokens under the decoder, with its gradient, and the routings.

    Prompts and completions are packed into rows of separate segments, so that little is computed for padding, and
    logits are only computed where a completion's token is predicted.

    Returns:
        [B,T], 0 after the end of a completion; routings of each layer
    """
    device = decoder.embedding.weight.device
    inputs = [[*p, *c[:-1]] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    lengths = torch.tensor([len(row) for row in inputs])
    capacity = int(lengths.max())
    tokens, segments, positions, places = _packed(inputs, best_fit(lengths.numpy(), capacity), capacity)
    hidden, routings = decoder.hidden(tokens.to(device), positions.to(device), segments.to(device))
    first = [place + len(prompt) - 1 for place, prompt in zip(places, rollout.prompts, strict=True)]
    where = [at for a, c in zip(first, rollout.completions, strict=True) for at in range(a, a + len(c))]
    wanted = torch.tensor([token for c in rollout.completions for token in c], device=device)
    logits = decoder.logits(hidden.flatten(0, 1)[torch.tensor(where, device=device)])
    found = log_probabilities(logits, wanted, temperature)
    mask = completion_mask(rollout).to(device)
    return found.new_zeros(mask.shape).masked_scatter(mask, found), routings


def _packed(inputs: list[list[int]], rows: list[list[int]], capacity: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Tokens, segments and positions [R,C] of packed inputs, and the flat place where each begins."""
    tokens = torch.zeros(len(rows), capacity, dtype=torch.int64)
    segments, positions, places = torch.zeros_like(tokens), torch.zeros_like(tokens), [0] * len(inputs)
    for row, items in enumerate(rows):
        at = 0
        for number, item in enumerate(items):
            n = len(inputs[item])
            tokens[row, at : at + n] = torch.tensor(inputs[item])
            segments[row, at : at + n], positions[row, at : at + n] = number, torch.arange(n)
            places[item] = row * capacity + at
            at += n
        segments[row, at:], positions[row, at:] = len(items), torch.arange(capacity - at)
    return tokens, segments, positions, places


def completion_mask(rollout: Rollout) -> Tensor:
    """Whether a place is a token of the completion [B,T]."""
    lengths = torch.tensor([len(c) for c in rollout.completions])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def padded(values: Sequence[Sequence[float]]) -> Tensor:
    """Lists of numbers as rows [B,T], 0 after their ends."""
    longest = max(map(len, values))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in values])
