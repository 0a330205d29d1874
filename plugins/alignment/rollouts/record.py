"""What was sampled: completions of prompts with all that an update needs of their sampling, scored with a gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise, product
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.blocks.initialise import stable_seed
from blockwright.blocks.kernels.log_probabilities import linear_log_probabilities
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.training.data.rows import best_fit
from blockwright.training.parallel.ranks import DataRanks

SUMS = ("figures", "judged")  # of a whole rollout


@dataclass
class Rollout:
    """Completions of prompts; nothing of sampling carries a gradient.

    Args:
        prompts: ids of the prompt of each completion
        completions: ids, with the one that ends it if it has ended
        sampler: log-probability of each token, as sampled
        ended: whether each ended by itself
        experts: of each completion, for each layer that routes, the experts of all tokens but the last, [n,k] int16;
            empty if they are not recorded
        kept: of each completion, (place, id) of the tokens that it was sampled among, [2,n] int32; empty for all tokens
        advantage: of each, once it is judged
        old: log-probability of each token as the trainer computes it, where several updates need it
        figures: sums of what is logged, by name
        judged: for figures that are a mean over the completions with a reward, how many these are
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    sampler: list[list[float]]
    ended: list[bool]
    experts: list[list[Tensor]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    old: list[list[float]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    judged: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, rows: Sequence[int]) -> Rollout:
        """Some of the completions, without figures."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SUMS}
        taken: dict[str, Any] = {name: [values[i] for i in rows if values] for name, values in lists.items()}
        return Rollout(**taken)

    def replace(self, rows: Sequence[int], others: Rollout) -> None:
        """Put other completions in the places of some."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(others, each.name)
            if each.name not in SUMS and mine:
                for row, value in zip(rows, theirs, strict=True):
                    mine[row] = value


def dealt_again(
    parts: Sequence[Rollout], slices: Sequence[Sequence[Sequence[int]]], number: int
) -> list[tuple[Rollout, list[list[int]]]]:
    """The part and the slices of each of another number of ranks: every update is of the same completions.

    Args:
        parts: of the rollout, one for each rank that sampled
        slices: completions of each update, for each of these ranks
        number: of ranks now
    """
    lists: dict[str, Any] = {}
    for name in (f.name for f in fields(Rollout) if f.name not in SUMS):
        lists[name] = [value for part in parts for value in getattr(part, name)]
    sums: dict[str, Any] = {name: Counter() for name in SUMS}
    for name, part in product(SUMS, parts):
        for key, value in getattr(part, name).items():
            sums[name][key] += value
    starts = accumulate(map(len, parts), initial=0)
    shifted = [[[start + row for row in rows] for rows in own] for start, own in zip(starts, slices, strict=False)]
    updates = [[row for rows in each for row in rows] for each in zip(*shifted, strict=True)]
    found, whole = [], Rollout(**lists)
    for rank in range(number):
        shares = [rows[rank::number] for rows in updates]
        part = whole.part([row for rows in shares for row in rows])
        for name in SUMS:  # they are summed over ranks again
            setattr(part, name, {key: value if rank == 0 else 0 for key, value in sums[name].items()})
        ends = list(accumulate(map(len, shares), initial=0))
        found.append((part, [list(range(*pair)) for pair in pairwise(ends)]))
    return found


def completion_mask(rollout: Rollout) -> Tensor:
    """Whether a place is a token of the completion [B,T]."""
    lengths = torch.tensor([len(c) for c in rollout.completions], dtype=torch.int64)
    return torch.arange(int(lengths.max())) < lengths[:, None]


def padded(values: Sequence[Sequence[float]]) -> Tensor:
    """Lists of numbers as rows [B,T], 0 after their ends."""
    longest = max(map(len, values))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in values], dtype=torch.float32)


# --- the rollouts of the current optimizer step, and the completions of each that an update is made of ----------------


class KeptRollouts:
    """Rollouts by number. Each is cut into equal parts, one for each update, after a shuffle.

    Args:
        seed: of the run

    Attributes:
        whole: number → rollout
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.whole: dict[int, Rollout] = {}
        self._dealt: dict[int, list[list[int]]] = {}  # completions of the updates of a rollout that was resumed

    def forget(self, oldest: int) -> None:
        """Drop the rollouts up to a number."""
        self.whole = {number: rollout for number, rollout in self.whole.items() if number > oldest}

    def slices(self, size: int, number: int, updates: int, rank: int) -> list[list[int]]:
        """The completions of each update of a rollout.

        Args:
            size: completions of this rank
            number: of the rollout
            updates: that it is used for
            rank: of this process among those that read different data
        """
        if number in self._dealt:
            return self._dealt[number]
        generator = torch.Generator().manual_seed(stable_seed(self.seed, f"slices/{number}/{rank}"))
        order, part = torch.randperm(size, generator=generator).tolist(), size // updates
        return [order[start : start + part] for start in range(0, size, part)]

    def stored(self, updates: int, ranks: DataRanks) -> list[Any]:
        """What a checkpoint keeps, of all ranks in their order: nothing if every rollout has one update.

        Returns:
            for each rank: number → the fields of its rollout, and its slices
        """
        if updates == 1:
            return []
        own = {
            number: {**vars(rollout), "slices": self.slices(len(rollout), number, updates, ranks.index)}
            for number, rollout in self.whole.items()
        }
        if ranks.number == 1:
            return [own]
        every: list[Any] = [None] * ranks.number
        torch.distributed.all_gather_object(every, own, group=ranks.group)
        return every

    def restore(self, stored: Sequence[Any], ranks: DataRanks) -> None:
        """Take the rollouts of a checkpoint, dealt again if there are now more or fewer ranks."""
        for number in stored[0] if stored else ():
            fields = [dict(own[number]) for own in stored]
            dealt = [own.pop("slices") for own in fields]
            parts = [Rollout(**own) for own in fields]
            shares = [*zip(parts, dealt, strict=True)]
            if len(parts) != ranks.number:
                shares = dealt_again(parts, dealt, ranks.number)
            self.whole[int(number)], self._dealt[int(number)] = shares[ranks.index]


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
