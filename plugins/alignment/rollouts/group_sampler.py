"""Groups of completions of prompts, sampled and judged."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.initialise import stable_seed
from blockwright.plugins.alignment.advantages import Advantage, deviation, total
from blockwright.plugins.alignment.data.prompt_module import PromptDataModule
from blockwright.plugins.alignment.rewards.judging import judge_rollout
from blockwright.plugins.alignment.rewards.rewards import Reward
from blockwright.plugins.alignment.rollouts.engine.native import Engine, Request
from blockwright.plugins.alignment.rollouts.record import Rollout
from blockwright.training.data.corpus import Split
from blockwright.training.parallel.local import gathered, is_distributed
from blockwright.training.parallel.ranks import DataRanks

Rewards = dict[str, list[float]]  # part of the reward → values, one a completion
Judged = tuple[Rewards, list[int]]


class GroupSampler:
    """Samples ``group_size`` completions of each prompt, and judges them.

    The draws of a completion are a function of seed, rollout, prompt and its number in the group.

    Args:
        engine: what samples
        reward: how completions are judged
        advantage: how rewards become advantages
        sampling: how tokens are drawn
        group_size: completions of a prompt
        max_new_tokens: tokens of a completion
        resamples: how often at most groups whose rewards are all equal are sampled again
        seed: of the run
    """

    def __init__(
        self,
        engine: Engine,
        reward: Reward,
        advantage: Advantage,
        sampling: Sampling,
        group_size: int,
        max_new_tokens: int,
        resamples: int,
        seed: int,
    ) -> None:
        self.engine, self.reward, self.advantage, self.sampling = engine, reward, advantage, sampling
        self.group_size, self.max_new_tokens, self.resamples, self.seed = group_size, max_new_tokens, resamples, seed

    def sample(
        self, decoder: Decoder, data: PromptDataModule, ranks: DataRanks, prompts: list[int], number: int
    ) -> tuple[Rollout, int]:
        """A rollout with advantages and figures, and how many tokens were sampled for it.

        Args:
            decoder: the policy, in evaluation mode
            data: where the prompts are
            ranks: which all sample, other prompts each
            prompts: their numbers
            number: of the rollout
        """
        device = decoder.embedding.weight.device
        names = [f"rollout/{number}/{n}/{i}" for n in prompts for i in range(self.group_size)]
        seeds = [stable_seed(self.seed, name) for name in names]
        found = self.continued(decoder, data, ranks, prompts, "train", seeds, self.sampling)
        rewards, failed = self.judged(data, found, self._grouped(prompts), "train")
        sampled, replaced = sum(map(len, found.completions)), set[int]()
        for attempt in range(1, self.resamples + 1):
            flat = self._flat(rewards).nonzero().flatten().tolist()
            if not ranks.sum(torch.tensor(len(flat), device=device, dtype=torch.int64)):
                break
            replaced |= set(flat)
            sampled += self._replace(decoder, data, ranks, flat, f"rollout/{number}/{attempt}", found, rewards, failed)
        # Advantages of this rank's completions, computed over the prompts of all ranks
        own = self._table(rewards).reshape(-1, self.group_size, len(rewards))
        every = own.new_zeros(ranks.number, *own.shape)
        every[ranks.index] = own
        advantage = self.advantage(ranks.sum(every.to(device)).flatten(0, 1).cpu(), self._weights)
        found.advantage = advantage.unflatten(0, (ranks.number, -1))[ranks.index].flatten().tolist()
        found.figures = self._figures(found, rewards, failed) | {"replaced": float(len(replaced) * self.group_size)}
        return found, sampled

    def _replace(
        self,
        decoder: Decoder,
        data: PromptDataModule,
        ranks: DataRanks,
        places: list[int],
        attempt: str,
        found: Rollout,
        rewards: Rewards,
        failed: list[int],
    ) -> int:
        """Sample groups again, for prompts that are a function of seed, attempt and place among all ranks.

        Returns:
            how many tokens were sampled
        """
        first, every = ranks.index * (len(found) // self.group_size), len(data.prompts("train"))
        names = [f"{attempt}/{first + place}" for place in places or [0]]  # all ranks take the steps
        prompts = [stable_seed(self.seed, name) % every for name in names]
        seeds = [stable_seed(self.seed, f"{name}/{i}") for name in names for i in range(self.group_size)]
        others = self.continued(decoder, data, ranks, prompts, "train", seeds, self.sampling)
        if places:
            rows = [place * self.group_size + i for place in places for i in range(self.group_size)]
            found.replace(rows, others)
            judged, lacking = self.judged(data, others, self._grouped(prompts), "train")
            for i, row in enumerate(rows):
                failed[row] = lacking[i]
                for name, part in judged.items():
                    rewards[name][row] = part[i]
        return sum(map(len, others.completions))

    def continued(
        self,
        decoder: Decoder,
        data: PromptDataModule,
        ranks: DataRanks,
        numbers: list[int],
        split: Split,
        seeds: list[int],
        sampling: Sampling,
    ) -> Rollout:
        """Completions of the prompts of a split, one for each seed."""
        prompts, ends = data.prompts(split), data.rendering.chat.ends(data.tokenizer)
        # Sharded weights and balance losses are exchanged in every forward pass: ranks take equally many.
        together = ranks.number > 1 or is_distributed(decoder)
        request = Request([prompts[n].ids for n in numbers], seeds, self.max_new_tokens, sampling, ends, together)
        with gathered(decoder):
            return self.engine.sample(decoder, request)

    def judged(self, data: PromptDataModule, found: Rollout, numbers: list[int], split: Split) -> Judged:
        """Rewards of each part for completions of prompts, NaN for none, and how many parts failed for each."""
        prompts = data.prompts(split)
        return judge_rollout(self.reward, data.tokenizer, [prompts[n] for n in numbers], found)

    def total(self, rewards: Mapping[str, list[float]]) -> Tensor:
        """Weighted sum of the parts, of each completion; NaN where no part has given a reward."""
        return total(self._table(rewards), self._weights)

    @property
    def _weights(self) -> Tensor:
        return torch.tensor([weight for weight, _ in self.reward.parts().values()], dtype=torch.float32)

    @staticmethod
    def _table(rewards: Mapping[str, list[float]]) -> Tensor:
        """Rewards [completions, parts]."""
        return torch.tensor(list(rewards.values()), dtype=torch.float32).T

    def _grouped(self, prompts: list[int]) -> list[int]:
        return [n for n in prompts for _ in range(self.group_size)]

    def _flat(self, rewards: Mapping[str, list[float]]) -> Tensor:
        """Whether the rewards of a group are all equal, or fewer than two of its completions have one."""
        groups = self.total(rewards).view(-1, self.group_size)
        spread = groups.nan_to_num(-torch.inf).amax(1) - groups.nan_to_num(torch.inf).amin(1)
        return spread < 1e-8

    def _figures(self, found: Rollout, rewards: Mapping[str, list[float]], failed: list[int]) -> dict[str, float]:
        """Sums over completions of what is logged; of rewards, over those that have one, which ``judged`` counts."""
        parts = {"reward": self.total(rewards)}
        if len(rewards) > 1:
            parts |= dict(zip((f"reward_{name}" for name in rewards), self._table(rewards).unbind(1), strict=True))
        found.judged = {name: int((~values.isnan()).sum()) for name, values in parts.items()}
        spread = deviation(parts["reward"].view(-1, self.group_size), 1)
        return {
            **{name: float(values.nansum()) for name, values in parts.items()},
            "judged": float(found.judged["reward"]),
            "reward_std": float(spread.sum() * self.group_size),
            "zero_spread": float(self._flat(rewards).sum() * self.group_size),
            "length": float(sum(map(len, found.completions))),
            "truncated": float(len(found) - sum(found.ended)),
            "reward_failures": float(sum(failed)),
        }


# --- rewards of held-out prompts: of one sampled and of the likeliest completion --------------------------------------


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
