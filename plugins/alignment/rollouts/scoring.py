"""Log-probabilities of completions under a decoder, with their gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.kernels.log_probabilities import linear_log_probabilities
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.plugins.alignment.rollouts.record import Rollout, completion_mask
from blockwright.training.data.rows import best_fit


@dataclass(frozen=True)
class ScoredRollout:
    """Scored completions.

    Args:
        logp: log-probability of each token [B,T], 0 after the end of a completion
        routings: of each layer; None where none routes
        rerouted: number of (token, layer) whose experts are not those of sampling
        routed: number of (token, layer) that were compared
    """

    logp: Tensor
    routings: list[Routing | None] = field(default_factory=list)
    rerouted: Tensor = field(default_factory=lambda: torch.tensor(0, dtype=torch.int64))
    routed: int = 0


def score(decoder: Decoder, rollout: Rollout, temperature: float, replay: bool = False) -> ScoredRollout:
    """Score completions.

    Prompts and completions are packed into rows of separate segments, so that little is computed for padding, and
    logits are only computed where a completion's token is predicted, and are never all in memory.

    Args:
        decoder: the policy
        rollout: what was sampled
        temperature: divides the logits
        replay: weigh the experts that were chosen at sampling, instead of choosing again (DeepSeek-V3.2, arXiv
            2512.02556, §3.1; R3, arXiv 2510.11370). Their weights are those of the present router, which so has its
            gradient
    """
    device = decoder.embedding.weight.device
    inputs = [[*p, *c[:-1]] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    packed = _Packed(inputs)
    experts = packed.experts(rollout, decoder, device)
    given = (packed.tokens.to(device), packed.positions.to(device), packed.segments.to(device))
    hidden, routings = decoder.hidden(*given, experts=experts if replay else None)
    first = [place + len(prompt) - 1 for place, prompt in zip(packed.places, rollout.prompts, strict=True)]
    where = [at for a, c in zip(first, rollout.completions, strict=True) for at in range(a, a + len(c))]
    wanted = torch.tensor([token for c in rollout.completions for token in c], device=device, dtype=torch.int64)
    scored = hidden.flatten(0, 1)[torch.tensor(where, device=device, dtype=torch.int64)]
    how = (decoder.logit_softcap, temperature, _kept(rollout, device))
    found = linear_log_probabilities(scored, decoder.output_weight, wanted, *how)
    mask = completion_mask(rollout).to(device)
    logp = found.new_zeros(mask.shape).masked_scatter(mask, found)
    return ScoredRollout(logp, routings, *_compared(experts, routings, device))


def at_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability in fp32 of tokens [...] under logits [...,V]."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _kept(rollout: Rollout, device: torch.device) -> Tensor | None:
    """(place among all completions' tokens, id) of the tokens sampled among, [2,n]."""
    if not rollout.kept:
        return None
    found, start = [], 0
    for kept, completion in zip(rollout.kept, rollout.completions, strict=True):
        found.append(kept.long() + torch.tensor([[start], [0]], dtype=torch.int64))
        start += len(completion)
    return torch.cat(found, 1).to(device)


def _compared(
    experts: list[Tensor | None] | None, routings: list[Routing | None], device: torch.device
) -> tuple[Tensor, int]:
    """How many tokens' experts differ, summed over layers, and how many were compared."""
    differ, compared = torch.zeros((), dtype=torch.long, device=device), 0
    for before, routing in zip(experts or [], routings, strict=False):
        if before is not None and routing is not None:
            known = before[:, 0] >= 0
            other = (before.sort(-1).values != routing.experts.sort(-1).values).any(-1)
            differ, compared = differ + (other & known).sum(), compared + int(known.sum())
    return differ, compared


class _Packed:
    """Sequences packed into rows: tokens, segments and positions [R,C], and the flat place where each begins."""

    def __init__(self, inputs: list[list[int]]) -> None:
        lengths = torch.tensor([len(row) for row in inputs], dtype=torch.int64)
        capacity = int(lengths.max())
        rows = best_fit(lengths.numpy(), capacity)
        self.tokens = torch.zeros(len(rows), capacity, dtype=torch.int64)
        self.segments, self.positions = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        self.places, self.lengths = [0] * len(inputs), lengths.tolist()
        for row, items in enumerate(rows):
            at = 0
            for number, item in enumerate(items):
                n = len(inputs[item])
                self.tokens[row, at : at + n] = torch.tensor(inputs[item], dtype=torch.int64)
                self.segments[row, at : at + n], self.positions[row, at : at + n] = number, torch.arange(n)
                self.places[item] = row * capacity + at
                at += n
            self.segments[row, at:], self.positions[row, at:] = PADDING, torch.arange(capacity - at)

    def experts(self, rollout: Rollout, decoder: Decoder, device: torch.device) -> list[Tensor | None] | None:
        """For each layer the experts at sampling, [R·C,k], −1 for padding; None where none routes."""
        if not rollout.experts:
            return None
        found: list[Tensor | None] = [None] * len(decoder.order())
        for number, layer in enumerate(routed_layers(decoder)):
            every = torch.full((self.tokens.numel(), rollout.experts[0][number].shape[1]), -1, dtype=torch.int64)
            for place, length, each in zip(self.places, self.lengths, rollout.experts, strict=True):
                every[place : place + length] = each[number].long()
            found[layer] = every.to(device)
        return found


def routed_layers(decoder: Decoder) -> list[int]:
    """The visits of layers that route: places in ``Decoder.order``."""
    routes = [any(isinstance(m, Gating) for m in layer.modules()) for layer in decoder.layers]
    return [i for i, layer in enumerate(decoder.order()) if routes[layer]]
