"""Policy optimisation against rewards: GRPO and its relatives, on completions sampled by the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

import registry
from blocks.decoder import Decoder
from blocks.dropping.base import Dropping
from blocks.gating.expert_choice import ExpertChoice
from blocks.gating.sinkhorn import Sinkhorn
from blocks.generation.generate import check_lengths
from blocks.initialise import stable_seed
from interop.source import load
from registry import ConfigError, Node, Scope
from registry.enforcing import enforced
from registry.ranges import Count, Positive
from training.data.corpus import Split
from training.data.prompt_module import PromptDataModule
from training.objectives.policy import Completions, PolicyObjective
from training.objectives.reward.judging import judge
from training.parallel.local import is_distributed
from training.tasks.base import Batch, Task
from training.tasks.rollout import Rollout, completion_mask, padded, sample_completions, score
from training.tasks.scored import Scored

Part = str | dict[str, Any]
GroupSize = Annotated[int, Ge(2)]


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
        reference: folder of the run or import that the penalty compares with
        group_size: completions of a prompt
        max_new_tokens: tokens of a completion, with its end
        temperature: of sampling, and of the policy whose gradient is followed
        mask_truncated: leave completions that did not end out of the loss
        settings: those of ``Task``
    """

    figures: ClassVar[tuple[str, ...]] = ("reward", "greedy")
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
        mask_truncated: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        scope = Scope({"ratio": Node(ratio, "task.ratio")}, {"max_new_tokens": max_new_tokens})

        def part(kind: str, node: Part | None) -> Any:
            return None if node is None else registry.build(kind, Node(node, f"task.{kind}"), scope)

        self.reward, self.advantage = part("reward", reward), part("advantage", advantage)
        self.policy = PolicyObjective(
            part("surrogate", surrogate),
            part("average", average),
            part("penalty", penalty),
            part("correction", correction),
        )
        if self.policy.penalty is not None and reference is None:
            rule = "a penalty compares the policy with a reference, and none is named"
            raise ConfigError("task.reference", None, rule, "Name its run: task.reference=RUN; or write ~task/penalty")
        self.reference = reference
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.temperature, self.mask_truncated = temperature, mask_truncated
        self._rollouts: dict[int, Rollout] = {}  # by number; those of the current optimizer step
        self._held_reference: tuple[Decoder, ...] = ()  # in a tuple, so that it is no part of the model
        self._measured: dict[str, Tensor] = {}

    # --- before training ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        super().configure_model()
        for name, module in self.model.named_modules():
            if isinstance(module, ExpertChoice | Sinkhorn | Dropping):
                rule = f"{name} looks at all tokens of a batch, so a rollout and its update choose other experts"
                raise ConfigError("model.gating", type(module).__name__, rule, "Use a gate that looks at one token")
        if self.context is not None:
            rule = "ranks that share the tokens of a sequence do not generate"
            raise ConfigError("trainer.strategy.context", self.context.size, rule, "Write 1")
        if any(p.requires_grad for p in self.model.mtp.parameters()):
            rule = "policy optimisation trains no multi-token prediction"
            raise ConfigError("task.frozen", list(self.frozen), rule, "Freeze it: task.frozen=[mtp]; or model.mtp=null")
        if self.policy.penalty is not None and not self._held_reference:
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
        """The data module.

        Raises:
            ConfigError: it has no prompts
        """
        found = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(found, PromptDataModule):
            rule = "this task samples answers to prompts, which the data does not give"
            raise ConfigError("data", type(found).__name__, rule, "Use data=prompts, or experiment=grpo_sort")
        return found

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
        numbers = [n for n in batch["prompt"].tolist() for _ in range(self.group_size)]
        seeds = [stable_seed(self.seed, f"rollout/{number}/{n}/{i % self.group_size}") for i, n in enumerate(numbers)]
        self.model.eval()
        found = self._continue(numbers, "train", seeds, self.temperature)
        rewards, texts = self._judge(found, numbers, "train")
        self._reward(found, rewards, texts)
        if self.data.updates > 1:
            with torch.no_grad():
                logp, _ = score(self.model, found, self.temperature)
            found.old = [row[: len(c)] for row, c in zip(logp.tolist(), found.completions, strict=True)]
        self.model.train()
        return found

    def _continue(self, numbers: list[int], split: Split, seeds: list[int], temperature: float) -> Rollout:
        prompts = self.data.prompts(split)
        ends = self.data.rendering.chat.ends(self.data.tokenizer)
        rows = [prompts[n].ids for n in numbers]
        # Sharded weights and balance losses are exchanged in every forward pass: ranks take equally many.
        together = self.ranks().number > 1 or is_distributed(self.model)
        return sample_completions(self.model, rows, seeds, self.max_new_tokens, temperature, ends, together)

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
        total = (own * weights).nansum(-1)
        flat = (total.amax(1) - total.amin(1)) < 1e-8
        found.figures = {
            "reward": float(total.sum()),
            "reward_std": float(total.std(1).sum() * self.group_size),
            "zero_spread": float(flat.sum() * self.group_size),
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
        counted = {"total": self.policy.average.count(mask), "tokens": mask.sum().clamp(min=1).long()}
        return {
            **counted,
            "completions": torch.tensor(len(rollout)),
            "sequences": torch.tensor(len(batch["tokens"])),
        }

    def _mask(self, rollout: Rollout) -> Tensor:
        mask = completion_mask(rollout)
        return mask & torch.tensor(rollout.ended)[:, None] if self.mask_truncated else mask

    def objective(self, batch: Batch, stage: str) -> Scored:
        rollout = self.rollout_of(batch)
        mask = self._mask(rollout).to(self.device)
        logp, routings = score(self.model, rollout, self.temperature)
        old = padded(rollout.old).to(self.device) if rollout.old else logp.detach()
        sampler = padded(rollout.sampler).to(self.device)
        advantage = torch.tensor(rollout.advantage, device=self.device)
        given = Completions(old, advantage, mask.float(), sampler, self._reference_logp(rollout))
        total, sums = self.policy(logp, given)
        sums["entropy"] = -(logp.detach() * mask).sum()  # estimated by the sampled tokens
        gap = ((old - sampler).abs() * mask).sum()
        figures = {name: self.step.mean(value, "tokens") for name, value in {**sums, "sampler_gap": gap}.items()}
        share = len(rollout) / max(len(self._rollouts[int(batch["rollout"][0])]), 1)
        whole = self._rollouts[int(batch["rollout"][0])].figures
        figures |= {
            name: self.step.mean(torch.tensor(value * share, device=self.device), "completions")
            for name, value in whole.items()
        }
        count = self.policy.average.count(mask)
        return Scored(total, count, figures=figures, routings=routings)

    @torch.no_grad()
    def _reference_logp(self, rollout: Rollout) -> Tensor | None:
        if not self._held_reference:
            return None
        return score(self._held_reference[0], rollout, self.temperature)[0]

    # --- measuring ------------------------------------------------------------------------------------------------

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._measured = {}

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
        weights = [weight for weight, _ in self.reward.parts().values()]
        for name, temperature in (("reward", self.temperature), ("greedy", 0.0)):
            found = self._continue(numbers, split, seeds, temperature)
            rewards, _ = self._judge(found, numbers, split)
            each = (torch.tensor(values[: len(real)]).nansum() for values in rewards.values())
            self._add(name, sum(w * value for w, value in zip(weights, each, strict=True)))
        self._add("prompts", torch.tensor(float(len(real))))

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
