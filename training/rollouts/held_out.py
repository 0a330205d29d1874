"""Rewards of held-out prompts: of one sampled and of the likeliest completion."""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.decoder import Decoder
from blocks.generation.sample import Sampling
from blocks.initialise import stable_seed
from training.data.corpus import Split
from training.data.prompt_module import PromptDataModule
from training.parallel.ranks import DataRanks
from training.rollouts.group_sampler import GroupSampler

SAMPLES = 8  # completions shown of a measurement


class HeldOut:
    """A measurement over batches of prompts.

    Args:
        sampler: what samples and judges

    Attributes:
        samples: prompt, sampled completion and reward of some prompts
    """

    def __init__(self, sampler: GroupSampler) -> None:
        self.sampler = sampler
        self.samples: list[tuple[str, str, float]] = []
        self._sums = {"reward": 0.0, "greedy": 0.0, "prompts": 0.0}

    @torch.no_grad()
    def add(self, decoder: Decoder, data: PromptDataModule, ranks: DataRanks, prompts: list[int], split: Split) -> None:
        """Answer prompts of a split, by number; those below 0 are padding of the batch."""
        real = [n for n in prompts if n >= 0]
        numbers = real or [0]  # a rank without any takes the steps of the others
        seeds = [stable_seed(self.sampler.seed, f"{split}/{n}") for n in numbers]
        for name, sampling in (("reward", self.sampler.sampling), ("greedy", Sampling(0.0))):
            found = self.sampler.continued(decoder, data, ranks, numbers, split, seeds, sampling)
            total = self.sampler.total(self.sampler.judged(data, found, numbers, split)[0])[: len(real)]
            self._sums[name] += float(total.sum())
            if sampling is self.sampler.sampling:
                asked, said = (data.prompts(split)[n].text for n in real), map(data.tokenizer.decode, found.completions)
                self.samples += zip(asked, said, total.tolist(), strict=False)
        self._sums["prompts"] += len(real)
        del self.samples[SAMPLES:]

    def means(self, ranks: DataRanks, device: torch.device) -> dict[str, Tensor]:
        """Mean rewards over the prompts of all ranks; must be called on all of them."""
        own = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=device)
        reward, greedy, prompts = ranks.sum(own)
        return {"reward": (reward / prompts).float(), "greedy": (greedy / prompts).float()}
