"""Policy optimisation against rewards: GRPO and its relatives, on completions sampled by the model itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

import registry
from blocks.decoder import Decoder
from blocks.dropping.base import Dropping
from blocks.gating.base import Gating, replays
from blocks.gating.expert_choice import ExpertChoice
from blocks.gating.sinkhorn import Sinkhorn
from blocks.generation.generate import check_lengths
from blocks.generation.sample import Sampling
from blocks.initialise import stable_seed
from blocks.lora import switched_off
from interop.source import load
from registry import ConfigError, Node, Scope
from registry.enforcing import enforced
from registry.ranges import Count, Fraction, Positive, Whole
from training.data.corpus import Split
from training.data.prompt_module import PromptDataModule
from training.objectives.policy import Completions, PolicyObjective
from training.objectives.reward.judging import judge
from training.parallel.gathered import gathered
from training.parallel.local import is_distributed
from training.rollouts.engine.base import Request
from training.rollouts.record import Rollout, completion_mask, padded
from training.rollouts.scoring import score
from training.tasks.base import Batch, Task
from training.tasks.needed_data import data_of
from training.tasks.scored import Scored

Part = str | dict[str, Any]
GroupSize = Annotated[int, Ge(2)]
SAMPLES = 8  # completions shown of a measurement


@enforced("task")
class Grpo(Task):
    """Samples groups of completions, rewards them, and follows the rewards.

    Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300; DeepSeek-V2's second alignment stage, arXiv 2405.04434, §4. Every
    formula is a registered kind, so DAPO, Dr. GRPO, GSPO and CISPO are choices of ``task/objective``.

    At the first batch of a rollout each prompt is continued ``group_size`` times, without gradient, and judged. The
    draws of a completion are a function of seed, rollout, prompt and its number in the group: neither world size nor
    micro-batches change a text. ``data.updates`` optimizer steps then take equal parts of the completions, shuffled.
    What was sampled is part of a checkpoint between two of them.

    The loss is averaged over the whole optimizer step, all micro-batches and ranks. With one update a rollout its value
    is near 0 by construction, while its gradient is not: watch ``train/reward``.

    Args:
        reward: how completions are judged
        advantage: how rewards become advantages
        surrogate: the loss of a token
        average: of the tokens' losses
        ratio: of tokens or of completions
        penalty: on the distance from ``reference``; null for none
        correction: weights against the difference of sampler and trainer; null for none
        reference: folder of the run or import that the penalty compares with; null with an adapter, for the model
            without it, which takes no further memory
        group_size: completions of a prompt
        max_new_tokens: tokens of a completion, with its end
        temperature: of sampling, and of the policy whose gradient is followed
        top_k, top_p, min_p: tokens that are sampled among (see ``Sampling``); null for all. The set of every step is
            kept, and the policy of the update is normalised over the same set (DeepSeek-V3.2, arXiv 2512.02556, §3.1):
            else every ratio would contain the probability of what was left out
        mask_truncated: leave completions that did not end out of the loss
        resamples: how often at most groups whose rewards are all equal are sampled again, for other prompts (dynamic
            sampling of DAPO, arXiv 2503.14476, §3.2, which has no bound); 0 for never
        replay: whether updates weigh the experts that were chosen at sampling, instead of choosing again (V3.2 keeps
            the routing)
        engine: what samples
        settings: those of ``Task``

    Attributes:
        samples: prompt, sampled completion and reward of some held-out prompts, when last measured
    """

    figures: ClassVar[tuple[str, ...]] = ("reward", "greedy")
    shown: ClassVar[tuple[str, ...]] = ("reward", "reward_std", "zero_spread", "kl", "entropy", "length", "truncated")
    curves: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "reward": ("train/reward", "val/reward", "val/greedy"),
        "shares": ("train/zero_spread", "train/replaced", "train/truncated"),
        "entropy": ("train/entropy", "train/kl"),
        "rises": ("train/rise_positive", "train/rise_negative"),
    }
    reads: ClassVar[tuple[str, ...]] = ("tokens", "lengths", "prompt", "rollout", "update")

    def __init__(
        self,
        *args: Any,
        reward: Part,
        advantage: Part = "group",
        surrogate: Part = "clip",
        average: Part = "token",
        ratio: Part = "token",
        penalty: Part | None = None,
        correction: Part | None = None,
        reference: str | None = None,
        group_size: GroupSize = 8,
        max_new_tokens: Count = 64,
        temperature: Positive = 1.0,
        top_k: Count | None = None,
        top_p: Fraction | None = None,
        min_p: Fraction | None = None,
        mask_truncated: bool = False,
        resamples: Whole = 0,
        replay: bool = False,
        engine: Part = "native",
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        scope = Scope({"ratio": Node(ratio, "task.ratio")}, {"max_new_tokens": max_new_tokens})

        def part(kind: str, node: Part | None) -> Any:
            return None if node is None else registry.build(kind, Node(node, f"task.{kind}"), scope)

        self.reward, self.advantage = part("reward", reward), part("advantage", advantage)
        self.engine = part("engine", engine)
        self.policy = PolicyObjective(
            part("surrogate", surrogate),
            part("average", average),
            part("penalty", penalty),
            part("correction", correction),
        )
        if self.policy.penalty is not None and reference is None and self.adapter is None:
            rule = "a penalty compares the policy with a reference, and none is named"
            raise ConfigError("task.reference", None, rule, "Name its run: task.reference=RUN; or write ~task/penalty")
        self.reference = reference
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.sampling = Sampling(temperature, top_k, top_p, min_p)
        self.mask_truncated, self.resamples, self.replay = mask_truncated, resamples, replay
        self._rollouts: dict[int, Rollout] = {}  # by number; those of the current optimizer step
        self._held_reference: tuple[Decoder, ...] = ()  # in a tuple, so that it is no part of the model
        self._measured: dict[str, Tensor] = {}
        self.samples: list[tuple[str, str, float]] = []  # prompt, completion and reward, of the last measurement
        self._sampled = (0, 0.0)  # tokens, and seconds, since the last log
        self._updated: tuple[Rollout, Tensor] | None = None  # completions of the last micro-batch, and their logp

    # --- before training ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        super().configure_model()
        for name, module in self.model.named_modules():
            if isinstance(module, ExpertChoice | Sinkhorn | Dropping):
                rule = f"{name} looks at all tokens of a batch, so a rollout and its update choose other experts"
                raise ConfigError("model.gating", type(module).__name__, rule, "Use a gate that looks at one token")
            if self.replay and isinstance(module, Gating) and not replays(module):
                rule = f"{name} takes no experts, so a routing cannot be replayed"
                raise ConfigError("task.replay", True, rule, "Give its choose the parameter experts, or write false")
        if self.context is not None:
            rule = "ranks that share the tokens of a sequence do not generate"
            raise ConfigError("trainer.strategy.context", self.context.size, rule, "Write 1")
        if any(p.requires_grad for p in self.model.mtp.parameters()):
            rule = "policy optimisation trains no multi-token prediction"
            raise ConfigError("task.frozen", list(self.frozen), rule, "Freeze it: task.frozen=[mtp]; or model.mtp=null")
        if self.policy.penalty is not None and self.reference is not None and not self._held_reference:
            reference = load(Path(str(self.reference)), device=self.model.embedding.weight.device)
            self._held_reference = (reference.requires_grad_(False),)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.data.updates > 1 and self.trainer.accumulate_grad_batches > 1:
            rule = "several updates of a rollout would be accumulated into one"
            remedy = "Write trainer.accumulate_grad_batches=1, or data.updates=1"
            raise ConfigError("data.updates", self.data.updates, rule, remedy)
        rows = self.data.batch_size // self.ranks().number * self.group_size
        if rows % self.data.updates:
            rule = f"must divide the {rows} completions of a rollout on each process"
            raise ConfigError("data.updates", self.data.updates, rule, "Choose a divisor")
        self._check_lengths()

    def _check_lengths(self) -> None:
        try:
            check_lengths(self.model, [max((p.ids for p in self.data.prompts("train")), key=len)], self.max_new_tokens)
        except registry.BlockError as error:
            raise ConfigError("task.max_new_tokens", self.max_new_tokens, error.rule, error.remedy) from None

    @property
    def data(self) -> PromptDataModule:
        """The data module; another kind is refused."""
        rule = "this task samples answers to prompts, which the data does not give"
        return data_of(self, PromptDataModule, rule, "Use data=prompts, or experiment=grpo_sort")

    # --- rollouts -------------------------------------------------------------------------------------------------

    def rollout_of(self, batch: Batch) -> Rollout:
        """The completions of a batch of prompts that one update is made of, sampled if they have not been."""
        number, update = int(batch["rollout"][0]), int(batch["update"][0])
        if number not in self._rollouts:
            oldest = number - self.trainer.accumulate_grad_batches
            self._rollouts = {k: v for k, v in self._rollouts.items() if k > oldest}
            self._rollouts[number] = self._sample(batch, number)
        whole = self._rollouts[number]
        if self.data.updates == 1:
            return whole
        generator = torch.Generator().manual_seed(stable_seed(self.seed, f"slices/{number}/{self.ranks().index}"))
        order = torch.randperm(len(whole), generator=generator).tolist()
        size = len(whole) // self.data.updates
        return whole.part(order[update * size : (update + 1) * size])

    def _sample(self, batch: Batch, number: int) -> Rollout:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # of the update before, whose time is not this one's
        prompts, began = batch["prompt"].tolist(), time.perf_counter()
        self.model.eval()
        found, rewards, failed = self._first(prompts, number)
        sampled = sum(map(len, found.completions))
        replaced: set[int] = set()
        for attempt in range(1, self.resamples + 1):
            flat = self._flat(rewards).nonzero().flatten().tolist()
            if not self.ranks().sum(torch.tensor(len(flat), device=self.device)):
                break
            replaced |= set(flat)
            sampled += self._replace(flat, number, attempt, found, rewards)
        self._reward(found, rewards, failed)
        found.figures["replaced"] = float(len(replaced) * self.group_size)
        if self.data.updates > 1:
            with torch.no_grad():
                logp = score(self.model, found, self.sampling.temperature, self.replay).logp
            found.old = [row[: len(c)] for row, c in zip(logp.tolist(), found.completions, strict=True)]
        self.model.train()
        self._sampled = (self._sampled[0] + sampled, self._sampled[1] + time.perf_counter() - began)
        return found

    def take_sampled(self) -> tuple[int, float]:
        taken, self._sampled = self._sampled, (0, 0.0)
        return taken

    def tokens_of(self, batch: Batch) -> int:
        rollout = self.rollout_of(batch)
        return sum(map(len, rollout.prompts)) + sum(map(len, rollout.completions))

    def _first(self, prompts: list[int], number: int) -> tuple[Rollout, dict[str, list[float]], int]:
        names = [f"rollout/{number}/{n}/{i}" for n in prompts for i in range(self.group_size)]
        found = self._continue(prompts, "train", [stable_seed(self.seed, name) for name in names], self.sampling)
        return found, *self._judge(found, self._grouped(prompts), "train")

    def _replace(
        self, places: list[int], number: int, attempt: int, found: Rollout, rewards: dict[str, list[float]]
    ) -> int:
        """Sample groups again, for prompts that are a function of seed, rollout, attempt and place among all ranks."""
        first, every = self.ranks().index * (len(found) // self.group_size), len(self.data.prompts("train"))
        names = [f"rollout/{number}/{attempt}/{first + place}" for place in places or [0]]  # all ranks take the steps
        prompts = [stable_seed(self.seed, name) % every for name in names]
        seeds = [stable_seed(self.seed, f"{name}/{i}") for name in names for i in range(self.group_size)]
        others = self._continue(prompts, "train", seeds, self.sampling)
        if places:
            rows = [place * self.group_size + i for place in places for i in range(self.group_size)]
            found.replace(rows, others)
            for name, values in self._judge(others, self._grouped(prompts), "train")[0].items():
                for row, value in zip(rows, values, strict=True):
                    rewards[name][row] = value
        return sum(map(len, others.completions))

    def _grouped(self, prompts: list[int]) -> list[int]:
        return [n for n in prompts for _ in range(self.group_size)]

    def _total(self, rewards: Mapping[str, list[float]]) -> Tensor:
        """Weighted sums of rewards, a row for each group."""
        weights = torch.tensor([weight for weight, _ in self.reward.parts().values()])
        return (torch.tensor(list(rewards.values())).T * weights).nansum(-1).view(-1, self.group_size)

    def _flat(self, rewards: Mapping[str, list[float]]) -> Tensor:
        """Whether the rewards of a group are all equal."""
        total = self._total(rewards)
        return (total.amax(1) - total.amin(1)) < 1e-8

    def _continue(self, numbers: list[int], split: Split, seeds: list[int], sampling: Sampling) -> Rollout:
        prompts = self.data.prompts(split)
        ends = self.data.rendering.chat.ends(self.data.tokenizer)
        # Sharded weights and balance losses are exchanged in every forward pass: ranks take equally many.
        together = self.ranks().number > 1 or is_distributed(self.model)
        request = Request([prompts[n].ids for n in numbers], seeds, self.max_new_tokens, sampling, ends, together)
        with gathered(self.model):
            return self.engine.sample(self.model, request)

    def _judge(self, found: Rollout, numbers: list[int], split: Split) -> tuple[dict[str, list[float]], int]:
        """Rewards of each part, and how many parts failed."""
        prompts = [self.data.prompts(split)[n] for n in numbers]
        texts = [self.data.tokenizer.decode(c) for c in found.completions]
        names = set.intersection(*(set(prompt.columns) for prompt in prompts))
        columns: dict[str, list[Any]] = {name: [prompt.columns[name] for prompt in prompts] for name in sorted(names)}
        columns |= {"n_tokens": [len(c) for c in found.completions], "ended": found.ended}
        return judge(self.reward, [prompt.text for prompt in prompts], texts, columns)

    def _reward(self, found: Rollout, rewards: Mapping[str, list[float]], failed: int) -> None:
        """Turn rewards into advantages, over the prompts of all ranks, and sum up what is logged."""
        weights = torch.tensor([weight for weight, _ in self.reward.parts().values()])
        own = torch.tensor(list(rewards.values())).T.reshape(-1, self.group_size, len(weights))
        ranks = self.ranks()
        every = own.new_zeros(ranks.number, *own.shape)
        every[ranks.index] = own
        advantage = self.advantage(ranks.sum(every.to(self.device)).flatten(0, 1).cpu(), weights)
        found.advantage = advantage.unflatten(0, (ranks.number, -1))[ranks.index].flatten().tolist()
        total = self._total(rewards)
        found.figures = {
            "reward": float(total.sum()),
            "reward_std": float(total.std(1).sum() * self.group_size),
            "zero_spread": float(self._flat(rewards).sum() * self.group_size),
            "length": float(sum(map(len, found.completions))),
            "truncated": float(len(found) - sum(found.ended)),
            "reward_failures": float(failed * len(found)),
        }
        if len(rewards) > 1:
            found.figures |= {f"reward_{k}": float(torch.tensor(v).nansum()) for k, v in rewards.items()}

    # --- the objective --------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        rollout = self.rollout_of(batch)
        mask = self._mask(rollout)
        return {
            "total": self.policy.average.count(mask),
            "tokens": mask.sum().clamp(min=1).long(),
            "routed": torch.tensor(sum(experts.shape[0] for row in rollout.experts for experts in row)),
            "completions": torch.tensor(len(rollout)),
            "sequences": torch.tensor(len(batch["tokens"])),
        }

    def _mask(self, rollout: Rollout) -> Tensor:
        mask = completion_mask(rollout)
        return mask & torch.tensor(rollout.ended)[:, None] if self.mask_truncated else mask

    def objective(self, batch: Batch, stage: str) -> Scored:
        rollout = self.rollout_of(batch)
        mask = self._mask(rollout).to(self.device)
        scored = score(self.model, rollout, self.sampling.temperature, self.replay)
        logp = scored.logp
        self._updated = (rollout, logp.detach())
        old = padded(rollout.old).to(self.device) if rollout.old else logp.detach()
        sampler = padded(rollout.sampler).to(self.device)
        advantage = torch.tensor(rollout.advantage, device=self.device)
        given = Completions(old, advantage, mask.float(), sampler, self._reference_logp(rollout))
        total, sums = self.policy(logp, given)
        sums["entropy"] = -(logp.detach() * mask).sum()  # estimated by the sampled tokens
        gap = ((old - sampler).abs() * mask).sum()
        figures = {name: self.step.mean(value, "tokens") for name, value in {**sums, "sampler_gap": gap}.items()}
        figures["rerouted"] = self.step.mean(scored.rerouted.float(), "routed")
        share = len(rollout) / max(len(self._rollouts[int(batch["rollout"][0])]), 1)
        whole = self._rollouts[int(batch["rollout"][0])].figures
        figures |= {
            name: self.step.mean(torch.tensor(value * share, device=self.device), "completions")
            for name, value in whole.items()
        }
        count = self.policy.average.count(mask)
        return Scored(total, count, figures=figures, routings=scored.routings)

    @torch.no_grad()
    def rises(self) -> dict[str, Tensor]:
        """By how much the last update raised the log-probability of a token, on average: of completions with a positive
        advantage, and of those with a negative one; all ranks must call it."""
        assert self._updated is not None
        rollout, before = self._updated
        with gathered(self.model):
            after = score(self.model, rollout, self.sampling.temperature, self.replay).logp
        mask, advantage = self._mask(rollout).to(self.device), torch.tensor(rollout.advantage, device=self.device)
        rise = (after - before).double() * mask
        signs = {"rise_positive": advantage > 0, "rise_negative": advantage < 0}
        sums = torch.stack([torch.stack((rise[of].sum(), mask[of].sum())) for of in signs.values()])
        return {name: (a / b.clamp(min=1)).float() for name, (a, b) in zip(signs, self.ranks().sum(sums), strict=True)}

    @torch.no_grad()
    def _reference_logp(self, rollout: Rollout) -> Tensor | None:
        if self.policy.penalty is None:
            return None
        plain = replace(rollout, experts=[])  # the reference routes by itself, and may have other layers
        if self._held_reference:
            return score(self._held_reference[0], plain, self.sampling.temperature).logp
        with switched_off(self.model):
            return score(self.model, plain, self.sampling.temperature).logp

    # --- measuring ------------------------------------------------------------------------------------------------

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._measured, self.samples = {}, []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._sample_held_out(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._sample_held_out(batch, "test")

    @torch.no_grad()
    def _sample_held_out(self, batch: Batch, split: Split) -> None:
        """Rewards of one sampled and of the likeliest completion of each held-out prompt."""
        real = [n for n in batch["prompt"].tolist() if n >= 0]
        numbers = real or [0]  # a rank without any takes the steps of the others
        seeds = [stable_seed(self.seed, f"{split}/{n}") for n in numbers]
        weights = torch.tensor([weight for weight, _ in self.reward.parts().values()])
        for name, sampling in (("reward", self.sampling), ("greedy", Sampling(0.0))):
            found = self._continue(numbers, split, seeds, sampling)
            rewards, _ = self._judge(found, numbers, split)
            total = (torch.tensor([values[: len(real)] for values in rewards.values()]).T * weights).nansum(-1)
            self._add(name, total.sum())
            if sampling is self.sampling:
                self._keep_samples(found, numbers, split, total.tolist())
        self._add("prompts", torch.tensor(float(len(real))))

    def _keep_samples(self, found: Rollout, numbers: list[int], split: Split, rewards: list[float]) -> None:
        for number, completion, reward in zip(numbers, found.completions, rewards, strict=False):
            if len(self.samples) < SAMPLES:
                prompt = self.data.prompts(split)[number].text
                self.samples.append((prompt, self.data.tokenizer.decode(completion), reward))

    def _add(self, name: str, value: Any) -> None:
        self._measured[name] = self._measured.get(name, torch.tensor(0.0)) + torch.as_tensor(value)

    def _conclude(self, stage: str) -> None:
        names = ("reward", "greedy", "prompts")
        own = torch.stack([self._measured.get(name, torch.tensor(0.0)) for name in names])
        reward, greedy, prompts = self.ranks().sum(own.double().to(self.device))
        self.log(f"{stage}/reward", (reward / prompts).float(), prog_bar=True)
        self.log(f"{stage}/greedy", (greedy / prompts).float())

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store what was sampled, on every rank, if updates of it are still to come."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollouts"] = self.ranks_gather({k: vars(v) for k, v in self._rollouts.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("rollouts") or []
        if len(stored) > self.ranks().index:
            self._rollouts = {int(k): Rollout(**v) for k, v in stored[self.ranks().index].items()}

    def ranks_gather(self, own: Any) -> list[Any]:
        """The values of all ranks that read different data, in their order."""
        ranks = self.ranks()
        if ranks.number == 1 or self.data.updates == 1:
            return [own] if self.data.updates > 1 else []
        every: list[Any] = [None] * ranks.number
        torch.distributed.all_gather_object(every, own, group=ranks.group)
        return every
