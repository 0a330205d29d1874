"""Gates that stay balanced without a loss: a bias or a threshold follows what steps counted, or experts choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.balance import Balance
from blockwright.blocks.gating.base import FILL, LinearGating, Masked, Routing, check_groups, count, keep_groups, rows
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative, Positive, ProperFraction, Whole

BINS = 1000  # of a histogram, as in Kimi K3
Range = tuple[Tensor, Tensor] | tuple[float, float]
UNGROUPED: Mapping[str, Any] = {"n_groups": 1, "top_groups": 1, "masked": "exclude"}


@register("gating", "sigmoid_bias")
class SigmoidBias(LinearGating):
    """Sigmoid gate balanced by a bias on the selection instead of a loss.

    DeepSeek-V3, arXiv 2412.19437, §2.1.2; Wang et al. 2024, arXiv 2408.15664: s = sigmoid(W x); choose by s + b (within
    the best groups: a group's score is the sum of its two highest s + b); weights are s at the chosen experts, without
    the bias, divided by their sum, times ``scaling``. After each optimizer step b_i −= γ if expert i got more than the
    mean load, b_i += γ if less, for the first ``bias_until`` steps.

    The bias is a buffer: it has no gradient, and changes once per step over all micro-batches. Experts outside the kept
    groups are excluded, as in DeepSeek's inference code; its Hugging Face code gives them a score of 0 (``masked:
    zero``) and may choose them where biased scores in the kept groups are negative. V3 needs 2 experts per group; here
    the score of a group of one is that of its expert.

    Args:
        top_k: k, experts per token
        n_groups: groups of equal size, contiguous in the expert index; 1 disables the group limit
        top_groups: groups a token may reach
        renormalise: whether the chosen weights are divided by their sum
        scaling: factor on the weights; 2.5 in V3
        masked: whether scores outside the kept groups are excluded, or count as zero
        bias_step: γ, change of the bias per step; 0.001 in V3
        bias_until: optimizer steps after which the bias is frozen, as in V3's last 500B tokens; null for never
        balance: additional balance losses, one or a list; null for none
    """

    # Fills differ where biased scores are negative and no other expert is left in the kept groups.
    conformance_settings: ClassVar[Mapping[str, Any]] = {"top_k": 4, "n_groups": 4, "top_groups": 2, "bias_step": 1.0}

    bias: Tensor
    moved: Tensor  # number of bias updates; a resumed run continues the count

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        n_groups: Count = 1,
        top_groups: Count = 1,
        renormalise: bool = True,
        scaling: Positive = 1.0,
        masked: Masked = "exclude",
        bias_step: NonNegative = 0.001,
        bias_until: Whole | None = None,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        check_groups(n_experts, n_groups, top_groups, top_k)
        self.n_groups, self.top_groups, self.fill = n_groups, top_groups, FILL[masked]
        self.renormalise, self.scaling = renormalise, scaling
        self.bias_step, self.bias_until = bias_step, bias_until
        self.register_buffer("bias", torch.zeros(n_experts, dtype=torch.float32))
        self.register_buffer("moved", torch.zeros((), dtype=torch.long))

    def affinity(self, logits: Tensor) -> Tensor:
        """Router logits [T,E] → affinities [T,E]."""
        return logits.sigmoid()

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = self.affinity(logits)
        choice = probs.detach() + self.bias.to(probs.dtype)
        if self.top_groups < self.n_groups:
            best_two = min(2, self.n_experts // self.n_groups)
            group_scores = choice.unflatten(-1, (self.n_groups, -1)).topk(best_two).values.sum(-1)
            choice = keep_groups(choice, group_scores, self.top_groups, self.fill)
        experts = choice.topk(self.top_k).indices if experts is None else experts
        weights = probs.gather(1, experts)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling, probs

    @torch.no_grad()
    def update(self, counted: Tensor) -> None:
        if self.bias_until is None or self.moved < self.bias_until:
            self.bias += self.bias_step * (counted.mean() - counted).sign()
            self.moved += 1


@register("gating", "sigmoid_quantile", fixes={**UNGROUPED, "bias_step": 0.0, "bias_until": None})
class SigmoidQuantile(SigmoidBias):
    """``sigmoid_bias`` whose biases are solved for, each step, so that every expert would have got its share.

    Quantile balancing, Kimi K3, arXiv 2607.24653, §2.3.3, without groups. With a_t the (k+1)-th highest s_j + b_j of
    token t, expert i would have been among its k had b_i been above a_t − s_i. So after each optimizer step b_i ← the
    k/E-quantile of a_t − s_i over the step's tokens, less the mean over experts. The load is even after one step,
    whatever it was, and there is no step size.

    The quantile is read from a histogram over [min b − 1, max b + 1], where all margins lie, with a straight line
    within a bin, as in the paper's appendix D; after a step without tokens the bias stays.
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"top_k": 4}

    def see(self, probs: Tensor, real: Tensor | None) -> Tensor | None:
        if self.top_k == self.n_experts:
            return None  # all of them are chosen, whatever the bias
        cutoff = (probs + self.bias.to(probs.dtype)).topk(self.top_k + 1).values[:, -1:]
        return histogram(cutoff - probs, self._range(), real)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.bias.min() - 1, self.bias.max() + 1

    @torch.no_grad()
    def update(self, counted: Tensor) -> None:
        if self.top_k < self.n_experts:
            solved = quantile(counted, self._range(), self.top_k / self.n_experts)
            self.bias.copy_(torch.where(counted.sum(1) > 0, solved - solved.mean(), self.bias))
            self.moved += 1


@register("gating", "expert_threshold")
class ExpertThreshold(LinearGating):
    """Experts take the tokens that score above their threshold: as many as each token deserves, k on average.

    Sun et al. 2026 (Expert Threshold Routing), arXiv 2603.11535: with s = sigmoid(W x), token t goes to each expert i
    with s_ti > c_i, with weight s_ti. After each optimizer step c_i moves to the (1 − k/E)-quantile of s_i over the
    step's tokens by an exponential mean, c_i ← β c_i + (1 − β) q_i. So loads are even without a loss, as where experts
    choose, and a choice depends on no other token, as where tokens do.

    A token has at most ``most`` experts, which bounds what a step may cost: the highest scores of those above. It may
    have none. Quantiles are read from a histogram over [0, 1]. At first the mean is that of the steps so far.

    Args:
        top_k: k, experts per token on average
        most: experts per token at most; null for 2 k
        decay: β, of the mean of thresholds
        balance: additional balance losses, one or a list; null for none
    """

    threshold: Tensor
    moved: Tensor  # number of updates

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        most: Count | None = None,
        decay: ProperFraction = 0.99,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        self.most = min(n_experts, 2 * top_k if most is None else most)
        if self.most < top_k:
            raise BlockError("most", most, f"is below the mean, top_k ({top_k})", "Raise it, or lower top_k")
        self.decay = decay
        self.register_buffer("threshold", torch.zeros(n_experts, dtype=torch.float32))
        self.register_buffer("moved", torch.zeros((), dtype=torch.long))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override] # no replay: E may be a choice
        probs = logits.sigmoid()
        above = probs > self.threshold.to(probs.dtype)
        scores, experts = torch.where(above, probs, 0.0).topk(self.most)
        taken = above.gather(1, experts)
        return torch.where(taken, experts, self.n_experts), scores * taken, probs

    def pairs(self, experts: Tensor) -> int | None:
        return rows(experts, self.n_experts, None)

    def see(self, probs: Tensor, real: Tensor | None) -> Tensor | None:
        return histogram(probs, (0.0, 1.0), real)

    @torch.no_grad()
    def update(self, counted: Tensor) -> None:
        found = quantile(counted, (0.0, 1.0), 1 - self.top_k / self.n_experts)
        share = torch.where(counted.sum(1) > 0, (1 / (self.moved + 1)).clamp(min=1 - self.decay), 0.0)
        self.threshold += share * (found - self.threshold)
        self.moved += 1


def histogram(values: Tensor, within: Range, real: Tensor | None) -> Tensor:
    """How many of values [T,E] of each expert are in each bin, [E,BINS].

    Args:
        within: the range; what is beyond is in the outermost bins
        real: which rows count, [B,T] or [T]; None for all
    """
    (low, high), E = within, values.shape[1]
    at = ((values - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    at = at + BINS * torch.arange(E, device=at.device)
    if real is not None:
        at = at.masked_fill(~real.flatten()[:, None], E * BINS)  # of none
    return count(at, E * BINS).view(E, BINS)


def quantile(counted: Tensor, within: Range, share: float) -> Tensor:
    """The quantile of each expert's histogram [E,BINS], by a straight line within a bin, [E] fp32."""
    (low, high), counted = within, counted.double()
    below = counted.cumsum(1)
    wanted = below[:, -1:] * share
    at = (below < wanted).sum(1, keepdim=True).clamp(max=BINS - 1)
    held = counted.gather(1, at)
    inside = (wanted - (below.gather(1, at) - held)) / held.clamp(min=1)
    return (low + (high - low) * (at + inside) / BINS).squeeze(1).float()


@register("gating", "softmax_bias")
class SoftmaxBias(SigmoidBias):
    """``sigmoid_bias`` with softmax(W x) in place of the sigmoid: affinities that compete.

    LongCat-Flash, arXiv 2509.01322, which does not divide the chosen weights by their sum: choice, groups and the bias
    that balances are as in ``sigmoid_bias``.
    """

    def affinity(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


@register("gating", "softplus_bias")
class SoftplusBias(SigmoidBias):
    """``sigmoid_bias`` with √softplus(W x) in place of the sigmoid: affinities without an upper bound.

    DeepSeek-V4: choice, groups, renormalised weights and the bias that balances are as in ``sigmoid_bias``.
    """

    def affinity(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sqrt()


@register("gating", "sigmoid_sink")
class SigmoidSink(LinearGating):
    """Sigmoid gate whose last experts are shared: every token has them, and they take weight from the chosen ones.

    Inkling (Thinking Machines 2026), as in transformers, with R = n_experts − n_shared routed experts and s = σ(W x):
    choose the k = top_k − n_shared highest s_i + b_i of i ≤ R; weights are s, divided by their sum over the chosen and
    the shared ones, times ``scaling`` and a learned number that starts at 1. So what a token does not want of any
    routed expert goes to the shared ones, as scores go to a sink. b is balanced as in ``sigmoid_bias``.

    Shared experts are the last of the stack: one network each, of a routed expert's width, where transformers stores
    them apart. Under expert parallelism they belong to the last rank, which every token then reaches. Balance losses
    and the bias see routed experts alone; the load counts all.

    Args:
        top_k: experts per token, the shared ones included; 8 in Inkling
        n_shared: shared experts; 2 in Inkling
        scaling: factor on the weights; 8 in Inkling
        bias_step: change of the bias per step
        balance: additional balance losses, one or a list; null for none
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"top_k": 6, "n_shared": 4, "bias_step": 1.0}

    bias: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 2,
        n_shared: Count = 1,
        scaling: Positive = 1.0,
        bias_step: NonNegative = 0.001,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        if n_shared >= top_k:
            rule = f"must leave some of the top_k ({top_k}) experts of a token to be chosen"
            raise BlockError("n_shared", n_shared, rule, "Raise top_k, which counts the shared ones too")
        self.n_routed, self.n_shared, self.scaling, self.bias_step = n_experts - n_shared, n_shared, scaling, bias_step
        self.gain = nn.Parameter(torch.empty(1))
        self.register_buffer("bias", torch.zeros(self.n_routed, dtype=torch.float32))

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        n = known["n_shared"]
        return {**super().child_context(child, known), "n_experts": known["n_experts"] - n, "top_k": known["top_k"] - n}

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.sigmoid()
        if experts is None:
            choice = probs[:, : self.n_routed].detach() + self.bias.to(probs.dtype)
            chosen = choice.topk(self.top_k - self.n_shared, sorted=False).indices
            shared = torch.arange(self.n_routed, self.n_experts, device=logits.device).expand(len(logits), -1)
            experts = torch.cat((chosen, shared), 1)
        logs = F.logsigmoid(logits.gather(1, experts))
        weights = (logs - logs.logsumexp(-1, keepdim=True)).exp()  # s over its sum, without a small divisor
        return experts, weights * self.scaling * self.gain.to(weights.dtype), probs

    def _losses(self, routing: Routing, logits: Tensor, length: int, real: Tensor | None) -> dict[str, Tensor]:
        R = self.n_routed
        chosen = routing.experts[:, : self.top_k - self.n_shared].clamp(max=R)  # R stands for none, as of padding
        return super()._losses(
            routing._replace(experts=chosen, probs=routing.probs[:, :R]), logits[:, :R], length, real
        )

    @torch.no_grad()
    def update(self, counted: Tensor) -> None:
        routed = counted[: self.n_routed]
        self.bias += self.bias_step * (routed.mean() - routed).sign()


@register("gating", "expert_choice")
class ExpertChoice(LinearGating):
    """Experts choose tokens, instead of tokens experts: the load is even by construction.

    Zhou et al. 2022, arXiv 2202.09368: S = softmax(W x) over experts, [T,E]; each expert takes the k T / E tokens of
    the batch that have the highest S in its column, with S as weight. A token is taken by any number of experts, k on
    average, or by none. T counts the tokens without padding.

    Which tokens an expert takes depends on all tokens of the batch, later ones included: a language model trained with
    it sees a little of the future in its training loss, and generates under another rule than it was trained with. It
    is here as the comparison that papers make, not for serving.

    Args:
        top_k: k, experts per token on average (the paper's capacity factor)
        balance: balance losses, one or a list; null for none, since the load is even anyway
    """

    causal: ClassVar[bool] = False
    independent: ClassVar[bool] = False

    def __init__(self, d_model: int, n_experts: int, top_k: Count = 2, balance: list[Balance] | None = None) -> None:
        super().__init__(d_model, n_experts, top_k, balance)

    def choose(self, logits: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs, E = logits.softmax(-1), self.n_experts
        scores = probs if real is None else probs.masked_fill(~real[:, None], -1)
        taken = scores.topk(self._capacity(len(probs)), dim=0).indices  # [c,E]
        within: bool | Tensor = True
        if real is not None:  # padding is last, and the capacity of the tokens a number that the host need not know
            capacity = (real.sum() * self.top_k // E).clamp(min=1)
            within = (torch.arange(len(taken), device=taken.device) < capacity)[:, None].expand_as(taken)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(0, taken, within)
        experts = torch.where(chosen, torch.arange(E, device=probs.device), E)  # a column per expert, E: not chosen
        return experts, probs * chosen, probs

    def _capacity(self, n_tokens: int) -> int:
        return min(n_tokens, max(1, n_tokens * self.top_k // self.n_experts))

    def pairs(self, experts: Tensor) -> int | None:
        return self._capacity(len(experts)) * self.n_experts


@register("gating", "sinkhorn")
class Sinkhorn(LinearGating):
    """Balanced assignment of the batch's tokens by Sinkhorn iterations during training; plain top-k in evaluation.

    Clark et al. 2022 (S-BASE), arXiv 2202.01169: exp(W x), [T,E], is scaled alternately to rows that sum to 1/T and
    columns that sum to 1/E; the k highest entries of a row are its experts. Weights are the unscaled affinities there:
    their softmax over experts, or, for k = 1, their sigmoid, as in Megatron-LM.

    The scaling carries no gradient. It uses the whole batch, so in training the choice for a token depends on later
    ones; in evaluation it is the k highest logits, which is causal. The number of iterations is fixed, without the
    tolerance of other implementations, which needs a data-dependent loop.

    Args:
        top_k: k, experts per token
        iterations: of the scaling
        balance: additional balance losses, one or a list; null for none
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: Count = 1,
        iterations: Count = 8,
        balance: list[Balance] | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, balance)
        self.iterations = iterations

    def choose(self, logits: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.sigmoid() if self.top_k == 1 else logits.softmax(-1)
        scores = balanced(logits.detach(), self.iterations, real) if self.training else logits
        experts = scores.topk(self.top_k).indices
        return experts, probs.gather(1, experts), probs


def balanced(logits: Tensor, iterations: int, real: Tensor | None = None) -> Tensor:
    """log of exp(logits), [T,E], scaled so that all columns have nearly the same sum, and all rows too.

    Args:
        real: [T], which rows are tokens; those of padding are in no sum of a column. None for all
    """
    counted = torch.zeros_like(logits[:, :1])
    if real is not None:
        counted = counted.masked_fill(~real[:, None], float("-inf"))
    rows, columns = torch.zeros_like(logits[:, :1]), torch.zeros_like(logits[:1])
    for _ in range(iterations):
        columns = -(logits + rows + counted).logsumexp(0, keepdim=True)
        rows = -(logits + columns).logsumexp(1, keepdim=True)
    return logits + rows + columns
