"""Reward models: a score for an answer, learned from preferences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockwright.plugins.alignment.preferences import bradley_terry
from blockwright.plugins.alignment.tasks.pairs import Pairwise
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative
from blockwright.training.tasks.base import Batch
from blockwright.training.tasks.making import Setup


@register("task", "reward")
class RewardModel(Pairwise):
    """Scores the chosen answer of a pair above the rejected one.

    Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155: −log σ(score(chosen) − score(rejected)). The score of an answer
    is a linear function of the last hidden state at the token that ends it. Its weights are the row of the output layer
    for the tokenizer's end token, as NVIDIA's Nemotron reward models use a row of theirs: so a reward model has the
    shape of the model that it starts from, and is sharded, resumed, exported and opened like it. Others add a layer.

    The reward ``reward_model`` scores completions with such a run.

    Args:
        setup: the model and how it is trained
        centre: weight of (score(chosen) + score(rejected))², which keeps scores around 0; 0.01 in TRL's examples
    """

    def __init__(self, setup: Setup, centre: NonNegative = 0.0) -> None:
        super().__init__(setup)
        self.centre = centre

    def compare(self, hidden: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        number = 2 * len(batch["pair"])
        flat, own = batch["sequence"].flatten(), torch.arange(number, device=hidden.device)[:, None]
        places = torch.arange(len(flat), device=hidden.device)
        last = torch.where(flat == own, places, -1).amax(1) + 1  # the target there is the end token, read one later
        scores = self.model.logits(hidden.flatten(0, 1)[last])[:, self.data.tokenizer.eos].float()
        chosen, rejected = scores.view(2, -1).unbind()
        return bradley_terry(chosen, rejected, self.centre), chosen, rejected

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store how conversations are written, for the reward ``reward_model``."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward_model"] = {"chat": self.data.chat.node()}
