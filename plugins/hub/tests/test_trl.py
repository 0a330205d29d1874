"""TRL's trainers run on the wrapper, and on one batch their loss and gradient are those of our tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.alignment.policy import Completions, PolicyObjective
from blockwright.plugins.alignment.rollouts.record import Rollout, completion_mask, padded, score
from blockwright.plugins.hub.transformers import BlockwrightConfig, BlockwrightForCausalLM
from blockwright.registry import Node, Scope, build
from blockwright.training.data.tokenizers import files as tokenizer
from blockwright.training.tasks.causal_lm import count_scored

trl = pytest.importorskip("trl", reason="needs blockwright[trl]")
pytestmark = pytest.mark.slow
SCOPE = Scope({"ratio": Node("token", "task.ratio")}, {"max_new_tokens": 8})

TEXTS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i), "other": "none" * (i % 3 + 1)} for i in range(40)]
COMMON: dict[str, Any] = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


class Watch:
    """Keeps the first batch of a trainer, its loss, and the gradient."""

    first: tuple[dict[str, Any], float, list[Tensor], float | None] | None = None

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        kept = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        found = super().compute_loss(model, inputs, *rest, **more)  # type: ignore[misc]
        if self.first is None:
            loss = found[0] if isinstance(found, tuple) else found
            gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            self.first = (kept, loss.item(), list(gradient), more.get("num_items_in_batch"))
        return found


@pytest.fixture(scope="module")
def saved(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of MLA and experts, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny(moe=True, vocab_size=257, max_positions=128, attention={"name": "mla"}, init={"std": 0.2})
    BlockwrightForCausalLM(BlockwrightConfig(model, eos_token_id=256, pad_token_id=256)).save_pretrained(folder)
    tokenizer.write({"kind": "bytes", "vocab_size": 257}, folder)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Callable[..., tuple[Any, Decoder]]:
    def train(kind: Any, settings: Any, rows: list[dict[str, str]], **more: Any) -> tuple[Any, Decoder]:
        model = AutoModelForCausalLM.from_pretrained(saved)
        before = copy.deepcopy(model.decoder)
        given = {"processing_class": AutoTokenizer.from_pretrained(saved), "train_dataset": Dataset.from_list(rows)}
        trainer = type("Watched", (Watch, kind), {})(model, args=settings, **given, **more)
        trainer.train()
        assert trainer.state.global_step == 5
        moved = [not torch.equal(p, q) for p, q in zip(model.decoder.parameters(), before.parameters(), strict=True)]
        assert all(moved)
        return trainer, before

    return train


def agree(decoder: Decoder, ours: Tensor, loss: float, gradient: list[Tensor]) -> None:
    assert ours.item() == pytest.approx(loss, abs=1e-5)
    for mine, theirs in zip(torch.autograd.grad(ours, list(decoder.parameters())), gradient, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert max(float(g.abs().max()) for g in gradient) > 1e-3


def test_supervised_fine_tuning(run: Any, tmp_path: Path) -> None:
    rows = [{"prompt": text["prompt"], "completion": text["completion"]} for text in TEXTS]
    trainer, decoder = run(trl.SFTTrainer, trl.SFTConfig(str(tmp_path), max_length=64, **COMMON), rows)
    batch, loss, gradient, counted = trainer.first
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    ours = decoder.nll(decoder.hidden(batch["input_ids"])[0], targets) / count_scored(targets)
    assert counted == count_scored(targets) > 4
    agree(decoder, ours, loss, gradient)


def test_direct_preference_optimisation(run: Any, tmp_path: Path) -> None:
    """−log σ(β (log π/π_ref of the chosen − of the rejected)), where at first π is π_ref."""
    rows = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": t["other"]} for t in TEXTS]
    trainer, decoder = run(trl.DPOTrainer, trl.DPOConfig(str(tmp_path), max_length=64, beta=0.1, **COMMON), rows)
    batch, loss, gradient, _ = trainer.first
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logp = decoder(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    chosen, rejected = (logp * mask[:, 1:]).sum(1).chunk(2)
    margin = (chosen - chosen.detach()) - (rejected - rejected.detach())
    agree(decoder, -torch.nn.functional.logsigmoid(0.1 * margin).mean(), loss, gradient)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_group_relative_policy_optimisation(run: Any, tmp_path: Path, loss_type: str) -> None:
    """Texts that transformers' ``generate`` wrote with our caches, scored by our trainer."""
    settings = trl.GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=8, loss_type=loss_type, **COMMON)
    rows = [{"prompt": text["prompt"]} for text in TEXTS]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 5) for text in completions]

    trainer, decoder = run(trl.GRPOTrainer, settings, rows, reward_funcs=reward)
    batch, loss, gradient, _ = trainer.first
    prompts = [row[m.bool()].tolist() for row, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    texts = [row[m.bool()].tolist() for row, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    rollout = Rollout(prompts, texts, [[0.0] * len(t) for t in texts], [True] * 4)
    logp = score(decoder, rollout, 1.0).logp
    mask = completion_mask(rollout)
    average = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}[loss_type]
    objective = PolicyObjective(
        *(build(kind, Node(name, kind), SCOPE) for kind, name in (("surrogate", "clip"), ("average", average)))
    )
    total, _ = objective(logp, Completions(logp.detach(), batch["advantages"], mask.float()))
    assert batch["advantages"].any() and len(padded(rollout.sampler)) == 4
    agree(decoder, total / objective.average.count(mask), loss, gradient)
