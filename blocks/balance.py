"""The contract of ``balance``: an auxiliary loss that evens out the load of experts. Children of gating, any number."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.over_ranks import OverRanks, sums_of, tokens_of
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, NonNegative


@family("balance", context=("n_experts", "top_k"))
class Balance(OverRanks, Block):
    """Returns weighted losses. Token counts carry no gradient, so it flows through the affinities only.

    A batch has padding, which is no token, and a rank may have some of the batch's sequences and some of a sequence's
    tokens. So a loss is made of ``over_sequences``, ``over_batch`` and ``mean``, which count the tokens of all ranks
    and no padding, and are what the losses of the ranks must be for their average to be that of all.

    Class attributes:
        splits: whether a sequence may be spread over ranks; else a training that does so is refused
    """

    splits: ClassVar[bool] = False

    def drawn(self) -> Drawn:
        return Drawn(lines=(), acts="training")

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of this routing.

        Args:
            probs: [B,T,E] affinities of B sequences, before any selection bias or group mask
            experts: [B,T,k] the choices made; E for padding
            logits: [B,T,E] the inputs of the affinities
            real: [B,T], which are tokens and not padding; None for all

        Returns:
            name → scalar, already weighted
        """
        raise NotImplementedError

    def over_sequences(self, counts: Tensor, values: Tensor, real: Tensor | None) -> Tensor:
        """Σ_i (counts of a sequence)_i / its tokens · (mean of values over its tokens)_i, averaged over the sequences.

        Args:
            counts: [B,n], of the tokens of each sequence
            values: [B,T,n]
            real: [B,T], as in ``forward``
        """
        n_tokens = tokens_of(values, real)
        counts, n_tokens = self.sequence_ranks.sum(torch.cat((counts, n_tokens), 1)).split((counts.shape[1], 1), 1)
        means = sums_of(values, real) * self.sequence_ranks.number / n_tokens.clamp(min=1)
        each = (counts / n_tokens.clamp(min=1) * means).sum(-1)  # 0 for a sequence of padding
        return each.sum() / (n_tokens > 0).sum().clamp(min=1)


def choices(experts: Tensor, probs: Tensor) -> Tensor:
    """Tokens of each sequence that chose each expert, [B,E] in the dtype of probs.

    Entries equal to E (no expert) are not counted.

    Args:
        experts: [B,T,k], or [T,k] for one sequence
        probs: [...,E]
    """
    flat, E = experts.flatten(-2), probs.shape[-1]
    counts = torch.zeros(*flat.shape[:-1], E + 1, dtype=probs.dtype, device=flat.device)
    return counts.scatter_add_(-1, flat, torch.ones_like(flat, dtype=probs.dtype))[..., :E]


def shares(probs: Tensor) -> Tensor:
    """Affinities [...,E], divided by their sum over experts."""
    return probs / probs.sum(-1, keepdim=True)


def check_devices(n_experts: int, n_devices: int) -> None:
    """Refuse a number of devices that does not divide the experts.

    Raises:
        BlockError
    """
    if n_devices < 1 or n_experts % n_devices:
        remedy = "Choose a divisor of the number of experts"
        raise BlockError("n_devices", n_devices, f"must divide n_experts ({n_experts})", remedy)


@register("balance", "communication")
class CommunicationBalance(Balance):
    """Communication balance loss of each sequence: balances how many tokens each device receives.

    DeepSeek-V2, arXiv 2405.04434, eq. 29: loss = α Σ_d f''_d P''_d; f''_d = D n_d / (M T), where n_d tokens were sent
    to device d; P''_d = Σ_{i on d} P_i, the sum of its experts'. A token with several experts on one device is sent
    there once. Devices hold equal, contiguous ranges of experts. Use it with ``group_limited`` gating of as many
    groups, whose ``top_groups`` is M: then every token reaches at most M devices.

    The released V2 code has no such loss; this is the paper's formula.

    Args:
        n_devices: D, devices that share the experts; 8 in V2
        top_devices: M, devices a token may reach; 3 in V2
        alpha: weight of the loss; 0.02 in V2
    """

    splits: ClassVar[bool] = True

    def __init__(
        self, n_experts: int, top_k: int, n_devices: Count = 8, top_devices: Count = 3, alpha: NonNegative = 0.02
    ) -> None:
        super().__init__()
        check_devices(n_experts, n_devices)
        if not 1 <= top_devices <= n_devices:
            rule = f"must lie between 1 and n_devices ({n_devices})"
            raise BlockError("top_devices", top_devices, rule, "Use the gate's top_groups")
        self.n_devices, self.top_devices, self.alpha = n_devices, top_devices, alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        device_of = experts // (probs.shape[-1] // self.n_devices)  # E, no expert, becomes D, no device
        reached = torch.zeros(*experts.shape[:2], self.n_devices + 1, dtype=probs.dtype, device=probs.device)
        reached = reached.scatter(-1, device_of, 1.0)[..., : self.n_devices]
        p = shares(probs).unflatten(-1, (self.n_devices, -1)).sum(-1)
        factor = self.alpha * self.n_devices / self.top_devices
        return {"communication_balance": factor * self.over_sequences(reached.sum(1), p, real)}


@register("balance", "device")
class DeviceBalance(Balance):
    """Device-level balance loss of each sequence: balances the load of the devices that hold the experts.

    DeepSeek-V2, arXiv 2405.04434, eq. 26: loss = α Σ_d f'_d P'_d; f'_d = mean_{i on d} f_i, of the experts of device d;
    P'_d = Σ_{i on d} P_i; f and P as in ``expert``. Devices hold equal, contiguous ranges of experts. A device here
    is a group of experts in the formula, whatever the run is distributed over. Perfectly even routing gives α.

    The released V2 code has no such loss; this is the paper's formula.

    Args:
        n_devices: D, devices that share the experts; 8 in V2
        alpha: weight of the loss; 0.05 in V2
    """

    splits: ClassVar[bool] = True

    def __init__(self, n_experts: int, top_k: int, n_devices: Count = 8, alpha: NonNegative = 0.05) -> None:
        super().__init__()
        check_devices(n_experts, n_devices)
        self.n_experts, self.top_k, self.n_devices, self.alpha = n_experts, top_k, n_devices, alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        counts = choices(experts, probs).unflatten(-1, (self.n_devices, -1)).mean(-1)
        p = shares(probs).unflatten(-1, (self.n_devices, -1)).sum(-1)
        factor = self.alpha * self.n_experts / self.top_k
        return {"device_balance": factor * self.over_sequences(counts, p, real)}


@register("balance", "expert")
class ExpertBalance(Balance):
    """Expert-level balance loss of each sequence, averaged over the batch.

    DeepSeek-V2, arXiv 2405.04434, eq. 23: loss = α Σ_i f_i P_i; f_i = E n_i / (k T), where n_i tokens of the sequence
    chose i; P_i = mean_t (s_i,t / Σ_j s_j,t). The division changes nothing for softmax affinities and makes it V3's
    sequence-wise loss for sigmoid ones. f counts the choices made, as in V2's released code; V3's paper defines f by
    the choices that the affinities without the bias would have made.

    Perfectly even routing gives α. Hugging Face's loss for Mixtral, Qwen3-MoE and OLMoE is ``hf_expert``.

    Args:
        alpha: weight of the loss; 0.003 in V2, 0.001 in V2-Lite, 0.0001 in V3
    """

    splits: ClassVar[bool] = True

    def __init__(self, n_experts: int, top_k: int, alpha: NonNegative = 0.003) -> None:
        super().__init__()
        self.n_experts, self.top_k, self.alpha = n_experts, top_k, alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        loss = self.over_sequences(choices(experts, probs), shares(probs), real)
        return {"expert_balance": self.alpha * self.n_experts / self.top_k * loss}


@register("balance", "hf_expert")
class HFExpertBalance(Balance):
    """Expert balance loss over the whole batch, in the convention of Hugging Face's Mixtral, Qwen3-MoE and OLMoE.

    Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4, extended to k choices: loss = α E Σ_i F_i P_i, where F_i
    is the number of choices of i per token; they sum to k. Perfectly even routing gives k·α, against α for ``expert``.

    transformers computes F and P over all layers together; here each layer has its own loss and they are added, so the
    two agree for one routed layer, and for L layers our sum is about L times larger.

    Args:
        alpha: weight of the loss; 0.001 in Qwen3-MoE's configuration, 0.01 in OLMoE's, 0.02 in Mixtral's
    """

    splits: ClassVar[bool] = True

    def __init__(self, alpha: NonNegative = 0.001) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        loss = self.over_batch(choices(experts.flatten(0, 1), probs), shares(probs), real)
        return {"hf_expert_balance": self.alpha * probs.shape[-1] * loss}


@register("balance", "z_loss")
class RouterZLoss(Balance):
    """Router z-loss: keeps router logits small, where fp32 softmax and low-precision activations are accurate.

    Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5: loss = α mean_t (log Σ_i exp z_i,t)². It balances no load; it is
    a block of this kind because gates handle it like a balance loss.

    Args:
        alpha: weight of the loss; 0.001 in ST-MoE and OLMoE
    """

    splits: ClassVar[bool] = True

    def __init__(self, alpha: NonNegative = 0.001) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, probs: Tensor, experts: Tensor, logits: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
        return {"z_loss": self.alpha * self.mean(logits.logsumexp(-1).square(), real)}
