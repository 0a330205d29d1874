"""Policy optimisation against rewards: GRPO and its relatives, on completions sampled by the model itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from blockwright import registry
from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.dropping import Dropping
from blockwright.blocks.gating.base import Gating, replays
from blockwright.blocks.gating.biased import ExpertChoice, Sinkhorn
from blockwright.blocks.generation.generate import check_lengths
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.linear import switched_off
from blockwright.blocks.position.base import boundaries
from blockwright.plugins.alignment.advantages import Advantage
from blockwright.plugins.alignment.data.prompt_module import PromptDataModule
from blockwright.plugins.alignment.policy import Completions, PolicyObjective, Ratio
from blockwright.plugins.alignment.rewards.judging import refuse_lacking
from blockwright.plugins.alignment.rewards.rewards import Reward
from blockwright.plugins.alignment.rollouts.engine.native import Engine
from blockwright.plugins.alignment.rollouts.group_sampler import GroupSampler, HeldOut
from blockwright.plugins.alignment.rollouts.record import KeptRollouts, Rollout, completion_mask, padded, score
from blockwright.plugins.alignment.tasks.needed_data import data_of
from blockwright.registry import ConfigError, register
from blockwright.registry.ranges import Count, Fraction, Positive, Whole
from blockwright.registry.schema import Place
from blockwright.training.data.corpus import SPLITS
from blockwright.training.figure import EVERY, TRAIN, Figure
from blockwright.training.parallel.local import gathered
from blockwright.training.tasks.base import Batch, Sample, Task
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.means import Scored

GroupSize = Annotated[int, Ge(2)]


@register("task", "grpo")
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
        setup: the model and how it is trained
        policy: the objective: surrogate, average, and a penalty on the distance from ``reference``
        reward: how completions are judged
        advantage: how rewards become advantages
        engine: what samples
        ratio: of tokens or of completions, for a surrogate that names none of its own
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

    Attributes:
        groups: samples and judges completions
        rollouts: what was sampled for the current optimizer step
        held_out: the last measurement on held-out prompts
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("reward", "a sampled completion", "more", EVERY),
        Figure("greedy", "a likeliest completion", "more"),
        Figure("loss", "of the objective", None, TRAIN),  # near 0 by construction
        Figure("reward_std", "within a group", None, TRAIN),
        Figure("judged", "of completions", "more", EVERY),
        Figure("reward_failures", "parts per completion", "less", EVERY),
        Figure("reward_{part}", "a sampled completion", "more", TRAIN),
        Figure("zero_spread", "of completions", None, TRAIN),
        Figure("replaced", "of completions", None, TRAIN),
        Figure("length", "tokens per completion", None, TRAIN),
        Figure("truncated", "of completions", None, TRAIN),
        Figure("entropy", "nats per token", None, TRAIN),
        Figure("kl", "nats per token", None, TRAIN),
        Figure("correction", "", None, TRAIN),
        Figure("clip_low", "of tokens", None, TRAIN),
        Figure("clip_high", "of tokens", None, TRAIN),
        Figure("sampler_gap", "nats per token", "less", TRAIN),
        Figure("rerouted", "of choices", None, TRAIN),
    )
    shown: ClassVar[tuple[str, ...]] = ("reward", "reward_std", "zero_spread", "kl", "entropy", "length", "truncated")
    curves: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "reward": ("train/reward", "val/reward", "val/greedy"),
        "shares": ("train/zero_spread", "train/replaced", "train/truncated"),
        "entropy": ("train/entropy", "train/kl"),
        "rises": ("train/rise_positive", "train/rise_negative"),
    }
    reads: ClassVar[tuple[str, ...]] = ("tokens", "lengths", "prompt", "rollout", "update")
    steady: ClassVar[bool] = False  # completions end when they end, and are sampled token by token
    improves: ClassVar[bool] = True
    default_children: ClassVar[Mapping[str, Any]] = {
        "advantage": "group",
        "surrogate": "clip",
        "average": "token",
        "ratio": "token",
        "engine": "native",
    }

    def __init__(
        self,
        setup: Setup,
        policy: PolicyObjective,
        reward: Reward,
        advantage: Advantage,
        engine: Engine,
        ratio: Ratio | None = None,
        reference: Place | None = None,
        group_size: GroupSize = 8,
        max_new_tokens: Count = 64,
        temperature: Positive = 1.0,
        top_k: Count | None = None,
        top_p: Fraction | None = None,
        min_p: Fraction | None = None,
        mask_truncated: bool = False,
        resamples: Whole = 0,
        replay: bool = False,
    ) -> None:
        super().__init__(setup)
        if policy.penalty is not None and reference is None and not any(start.detachable for start in setup.starts):
            rule = "a penalty compares the policy with a reference, and none is named"
            raise ConfigError("task.reference", None, rule, "Name its run: task.reference=RUN; or write ~task/penalty")
        sampling = Sampling(temperature, top_k, top_p, min_p)
        limits = (group_size, max_new_tokens, resamples, self.seed)
        self.policy, self.groups = policy, GroupSampler(engine, reward, advantage, sampling, *limits)
        self.reference, self.temperature = reference, temperature
        self.mask_truncated, self.replay = mask_truncated, replay
        self.rollouts = KeptRollouts(self.seed)
        self.held_out = HeldOut(self.groups)  # of the last measurement
        self._reference_model: tuple[Decoder, ...] = ()  # in a tuple, so that it is no part of the model
        self._sampled = (0, 0.0)  # tokens, and seconds, since the last log
        self._updated: tuple[Rollout, Tensor] | None = None  # completions of the last micro-batch, and their logp

    # --- before training ------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse records without a column that the reward reads, in any split."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PromptDataModule):  # another kind is refused where it is read first
            refuse_lacking([prompt for split in SPLITS for prompt in data.prompts(split)], self.groups.reward)

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
            frozen = list(self.configured.frozen)
            raise ConfigError("task.frozen", frozen, rule, "Freeze it: task.frozen=[mtp]; or model.mtp=null")
        if self.policy.penalty is not None and self.reference is not None and not self._reference_model:
            like = self.model.embedding.weight  # in whose precision a policy that has not moved is no distance away
            try:
                reference = load(Path(self.reference), dtype=like.dtype, device=like.device)
            except ConfigError as error:
                raise ConfigError("task.reference", error.value, error.rule, error.remedy) from None
            self._reference_model = (reference.requires_grad_(False),)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.data.updates > 1 and self.trainer.accumulate_grad_batches > 1:
            rule = "several updates of a rollout would be accumulated into one"
            remedy = "Write trainer.accumulate_grad_batches=1, or data.updates=1"
            raise ConfigError("data.updates", self.data.updates, rule, remedy)
        rows = self.data.batch_size // self.ranks().number * self.groups.group_size
        if rows % self.data.updates:
            rule = f"must divide the {rows} completions of a rollout on each process"
            raise ConfigError("data.updates", self.data.updates, rule, "Choose a divisor")
        self._check_lengths()

    def _check_lengths(self) -> None:
        prompts, new = sorted((p.ids for p in self.data.prompts("train")), key=len), self.groups.max_new_tokens
        try:
            check_lengths(self.model, prompts[-1:], new)
        except registry.BlockError as error:
            raise ConfigError("task.max_new_tokens", new, error.rule, error.remedy) from None
        shortest, longest = len(prompts[0]), len(prompts[-1]) + new - 1
        if any(shortest <= boundary < longest for boundary in boundaries(self.model)):
            rule = f"null, and sequences of {shortest} to {longest} tokens are rotated as short ones or as long ones"
            raise ConfigError("model.position.length", None, rule, f"Declare one length for all, such as {longest}")

    @property
    def data(self) -> PromptDataModule:
        """The data module; another kind is refused."""
        rule = "this task samples answers to prompts, which the data does not give"
        return data_of(self, PromptDataModule, rule, "Use data=prompts, or experiment=grpo_sort")

    # --- rollouts -------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> None:
        """Sample and judge the completions of a batch of prompts, if no update before has."""
        number = int(batch["rollout"][0])
        if number not in self.rollouts.whole:
            self.rollouts.forget(number - self.trainer.accumulate_grad_batches)
            self.rollouts.whole[number] = self._sample(batch["prompt"].tolist(), number)

    def rollout_of(self, batch: Batch) -> Rollout:
        """The completions that the update of a batch is made of."""
        number, update = int(batch["rollout"][0]), int(batch["update"][0])
        whole = self.rollouts.whole[number]
        return whole if self.data.updates == 1 else whole.part(self._slices(whole, number)[update])

    def _whole(self, batch: Batch) -> tuple[Rollout, float]:
        """The rollout of a batch, and the share of it that its update is made of."""
        return self.rollouts.whole[int(batch["rollout"][0])], 1 / self.data.updates

    def _slices(self, whole: Rollout, number: int) -> list[list[int]]:
        return self.rollouts.slices(len(whole), number, self.data.updates, self.ranks().index)

    def _sample(self, prompts: list[int], number: int) -> Rollout:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # of the update before, whose time is not this one's
        began = time.perf_counter()
        self.model.eval()
        with self.as_in_a_step:  # batches are prepared outside of one
            sampled, n_tokens = self.groups.sample(self.model, self.data, self.ranks(), prompts, number)
            if self.data.updates > 1:
                self._score_old(sampled, number)
        self.model.train()
        self._sampled = (self._sampled[0] + n_tokens, self._sampled[1] + time.perf_counter() - began)
        return sampled

    @torch.no_grad()
    def _score_old(self, sampled: Rollout, number: int) -> None:
        """Score completions before the first update, packed as the updates pack them: their ratios begin at 1."""
        old: list[list[float]] = [[] for _ in range(len(sampled))]
        for rows in self._slices(sampled, number):
            logp = score(self.model, sampled.part(rows), self.temperature, self.replay).logp
            for row, values in zip(rows, logp.tolist(), strict=True):
                old[row] = values[: len(sampled.completions[row])]
        sampled.old = old

    def take_sampled(self) -> tuple[int, float]:
        taken, self._sampled = self._sampled, (0, 0.0)
        return taken

    def tokens_of(self, batch: Batch) -> int:
        rollout = self.rollout_of(batch)
        return sum(map(len, rollout.prompts)) + sum(map(len, rollout.completions))

    # --- the objective --------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        rollout = self.rollout_of(batch)
        mask = self._mask(rollout)
        whole, share = self._whole(batch)
        return {
            "total": self.policy.average.count(mask),
            "tokens": mask.sum().clamp(min=1).long(),
            "routed": torch.tensor(
                sum(experts.shape[0] for row in rollout.experts for experts in row), dtype=torch.int64
            ),
            "completions": torch.tensor(len(rollout), dtype=torch.int64),
            **{f"judged/{name}": torch.tensor(n * share, dtype=torch.float64) for name, n in whole.judged.items()},
        }

    def _mask(self, rollout: Rollout) -> Tensor:
        mask = completion_mask(rollout)
        return mask & torch.tensor(rollout.ended, dtype=torch.bool)[:, None] if self.mask_truncated else mask

    def _advantage(self, rollout: Rollout) -> Tensor:
        return torch.tensor(rollout.advantage, device=self.device, dtype=torch.float32)

    def objective(self, batch: Batch, stage: str) -> Scored:
        rollout = self.rollout_of(batch)
        mask = self._mask(rollout).to(self.device)
        scored = score(self.model, rollout, self.temperature, self.replay)
        logp = scored.logp
        self._updated = (rollout, logp.detach())
        old = padded(rollout.old).to(self.device) if rollout.old else logp.detach()
        sampler = padded(rollout.sampler).to(self.device)
        given = Completions(old, self._advantage(rollout), mask.float(), sampler, self._reference_logp(rollout))
        total, sums = self.policy(logp, given)
        sums["entropy"] = -(logp.detach() * mask).sum()  # estimated by the sampled tokens
        gap = ((old - sampler).abs() * mask).sum()
        figures = {name: self.step.mean(value, "tokens") for name, value in {**sums, "sampler_gap": gap}.items()}
        figures["rerouted"] = self.step.mean(scored.rerouted.float(), "routed")
        whole, share = self._whole(batch)
        for name, value in whole.figures.items():
            of = f"judged/{name}" if name in whole.judged else "completions"
            own = torch.tensor(value * share, dtype=torch.float32, device=self.device)
            figures[name] = self.step.figure(own, of)
        count = self.policy.average.count(mask)
        return Scored(total, count, figures=figures, routings=scored.routings)

    def samples(self) -> Sequence[Sample]:
        return self.held_out.samples

    @torch.no_grad()
    def rises(self) -> dict[str, Tensor]:
        """By how much the last update raised the log-probability of a token, on average: of completions with a positive
        advantage, and of those with a negative one; all ranks must call it."""
        assert self._updated is not None
        rollout, before = self._updated
        with gathered(self.model), self.as_in_a_step:
            after = score(self.model, rollout, self.temperature, self.replay).logp
        mask, advantage = self._mask(rollout).to(self.device), self._advantage(rollout)
        rise = (after - before).double() * mask
        signs = {"rise_positive": advantage > 0, "rise_negative": advantage < 0}
        sums = torch.stack([torch.stack((rise[of].sum(), mask[of].sum())) for of in signs.values()])
        return {name: (a / b.clamp(min=1)).float() for name, (a, b) in zip(signs, self.ranks().sum(sums), strict=True)}

    @torch.no_grad()
    def _reference_logp(self, rollout: Rollout) -> Tensor | None:
        if self.policy.penalty is None:
            return None
        plain = replace(rollout, experts=[])  # the reference routes by itself, and may have other layers
        if self._reference_model:
            return score(self._reference_model[0], plain, self.temperature).logp
        with switched_off(self.model):
            return score(self.model, plain, self.temperature).logp

    # --- measuring ------------------------------------------------------------------------------------------------

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self.held_out = HeldOut(self.groups)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.held_out.add(self.model, self.data, self.ranks(), batch["prompt"].tolist(), "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.held_out.add(self.model, self.data, self.ranks(), batch["prompt"].tolist(), "test")

    def _conclude(self, stage: str) -> None:
        for name, value in self.held_out.means(self.ranks(), self.device).items():
            self.log(f"{stage}/{name}", value)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store what was sampled, on every rank, if updates of it are still to come."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollouts"] = self.rollouts.stored(self.data.updates, self.ranks())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.rollouts.restore(checkpoint.get("rollouts") or [], self.ranks())
