"""Rewards of held-out prompts: of one sampled and of the likeliest completion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.initialise import stable_seed
from blockwright.plugins.alignment.data.prompt_module import PromptDataModule
from blockwright.plugins.alignment.rollouts.group_sampler import GroupSampler
from blockwright.plugins.alignment.rollouts.record import Rollout
from blockwright.training.data.corpus import Split
from blockwright.training.parallel.ranks import DataRanks

SAMPLES = 8  # completions shown of a measurement
MEANS = ("reward", "greedy")  # of sampled completions, and of the likeliest


class HeldOut:
    """A measurement over batches of prompts: means over the completions that have a reward.

    Args:
        sampler: what samples and judges

    Attributes:
        samples: prompt, sampled completion and reward, None for none, of some prompts
    """

    def __init__(self, sampler: GroupSampler) -> None:
        self.sampler = sampler
        self.samples: list[tuple[str, str, float | None]] = []
        counts = [f"{name}_{of}" for name in MEANS for of in ("judged", "completions")]
        self._sums = dict.fromkeys((*MEANS, *counts, "failures"), 0.0)

    @torch.no_grad()
    def add(self, decoder: Decoder, data: PromptDataModule, ranks: DataRanks, prompts: list[int], split: Split) -> None:
        """Answer prompts of a split, by number; those below 0 are padding of the batch."""
        real = [n for n in prompts if n >= 0]
        numbers = real or [0]  # a rank without any takes the steps of the others
        seeds = [stable_seed(self.sampler.seed, f"{split}/{n}") for n in numbers]
        for name, sampling in zip(MEANS, (self.sampler.sampling, Sampling(0.0)), strict=True):
            found = self.sampler.continued(decoder, data, ranks, numbers, split, seeds, sampling)
            if real:
                self._count(name, data, found, real, split)
        del self.samples[SAMPLES:]

    def _count(self, name: str, data: PromptDataModule, found: Rollout, prompts: list[int], split: Split) -> None:
        rewards, failed = self.sampler.judged(data, found, prompts, split)
        values = [None if math.isnan(value) else value for value in self.sampler.total(rewards).tolist()]
        judged = [value for value in values if value is not None]
        more = {name: sum(judged), f"{name}_judged": len(judged), f"{name}_completions": len(values)}
        for key, value in {**more, "failures": sum(failed)}.items():
            self._sums[key] += value
        if name == "reward":
            asked, said = (data.prompts(split)[n].text for n in prompts), map(data.tokenizer.decode, found.completions)
            self.samples += zip(asked, said, values, strict=True)

    def means(self, ranks: DataRanks, device: torch.device) -> dict[str, Tensor]:
        """Mean rewards over the prompts of all ranks, NaN where none has one; ``judged``, the share of completions that
        have one, and ``reward_failures``, rewards that failed, per completion. Must be called on all ranks."""
        own = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=device)
        sums = dict(zip(self._sums, ranks.sum(own), strict=True))
        found = {name: sums[name] / sums[f"{name}_judged"] for name in MEANS}
        completions, judged = (sum(sums[f"{name}_{of}"] for name in MEANS) for of in ("completions", "judged"))
        found |= {"judged": judged / completions, "reward_failures": sums["failures"] / completions}
        return {name: value.float() for name, value in found.items()}
