"""The contract of ``engine``: what samples completions; and the engine that is the model itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import check_lengths, read
from blockwright.blocks.generation.sample import Sampling, draw, narrow
from blockwright.plugins.alignment.rollouts.record import Rollout, at_tokens
from blockwright.registry import BlockError, Composable, family, register


@dataclass(frozen=True)
class Request:
    """What to sample.

    Args:
        prompts: ids of each prompt, at least one
        seeds: of the draws of each completion, which depend on nothing else; the same number for each prompt, in the
            order of the prompts
        new_tokens: of a completion, at most
        sampling: how a token is drawn; without a repetition penalty
        ends: tokens that end a completion
        together: take ``new_tokens`` steps even if all have ended, for ranks that must take equally many
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    new_tokens: int
    sampling: Sampling
    ends: Collection[int]
    together: bool = False

    @property
    def copies(self) -> int:
        """Completions of a prompt."""
        return len(self.seeds) // len(self.prompts)


@family("engine", root="task")
class Engine(Composable):
    """Samples completions from a decoder's present weights."""

    def __init__(self) -> None: ...  # for engines without settings

    @abstractmethod
    def sample(self, decoder: Decoder, request: Request) -> Rollout:
        """Continue prompts until they end.

        Args:
            decoder: in evaluation mode
            request: what to sample
        """


@register("engine", "native")
class Native(Engine):
    """Samples with the decoder that is trained, so there is no second copy of its weights.

    A prompt is read once, and its caches are copied for its completions. All rows decode together; once half of them
    have ended, the others continue alone. Under ``no_grad``, not ``inference_mode``: a sharded model whose first pass
    is in inference mode cannot be trained afterwards.
    """

    @torch.no_grad()
    def sample(self, decoder: Decoder, request: Request) -> Rollout:
        check_lengths(decoder, request.prompts, request.new_tokens)
        rows = _Rows(decoder, request)
        for step in range(request.new_tokens):
            rows.draw()
            if step == request.new_tokens - 1 or (all(rows.found.ended) and not request.together):
                break
            rows.feed()
        return rows.finished()


class _Rows:
    """Rows that are decoded together: those of ``found`` in ``running``."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self.decoder, self.request = decoder, request
        self.device = decoder.embedding.weight.device
        prompts, copies = request.prompts, request.copies
        self.longest = max(map(len, prompts))
        missing = [self.longest - len(row) for row in prompts]
        padding = torch.tensor(missing, device=self.device, dtype=torch.int64) if any(missing) else None
        room = max(self.longest + request.new_tokens - 1, 1)
        self.caches = decoder.new_caches(len(prompts), room, None, padding)
        tokens = torch.tensor([[0] * n + list(row) for n, row in zip(missing, prompts, strict=True)], dtype=torch.int64)
        logits, chosen = read(decoder, tokens.to(self.device), self.caches)
        self.running = list(range(len(request.seeds)))
        each = torch.arange(len(prompts), device=self.device).repeat_interleave(copies)
        self.logits = self._take(each, logits)
        self.experts = [experts.new_full((len(each), room, experts.shape[-1]), -1).short() for experts in chosen]
        self._record([experts[each] for experts in chosen], 0)
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in request.seeds]
        self.kept: list[list[Tensor]] = [[] for _ in each]
        repeated = [list(row) for row in prompts for _ in range(copies)]
        self.found = Rollout(repeated, [[] for _ in each], [[] for _ in each], [False] * len(each))

    def _take(self, rows: Tensor, logits: Tensor) -> Tensor:
        for cache in self.caches:
            if not isinstance(cache, Cache):
                rule = f"{type(cache).__name__} is not a blockwright.blocks.cache.base.Cache, whose rows can be copied"
                raise BlockError("engine", "native", rule, "Derive it from blockwright.blocks.cache.base.Cache")
            cache.take(rows)
        return logits[rows]

    def _record(self, chosen: list[Tensor], at: int) -> None:
        rows = torch.tensor(self.running, device=self.device, dtype=torch.int64)
        for every, experts in zip(self.experts, chosen, strict=True):
            every[rows, at : at + experts.shape[1]] = experts.short()

    def draw(self) -> None:
        """Draw a token for every running row."""
        scaled = narrow(self.logits, self.request.sampling)
        self.drawn = draw(scaled, self.request.sampling, [self.generators[row] for row in self.running])
        logp = at_tokens(scaled, self.drawn).tolist()
        if self.request.sampling.narrows:
            places = scaled.isfinite().nonzero().to(torch.int32).cpu()
            among = places[:, 1].split(torch.bincount(places[:, 0], minlength=len(self.running)).tolist())
        for i, (row, token) in enumerate(zip(self.running, self.drawn.tolist(), strict=True)):
            if self.found.ended[row]:
                continue
            if self.request.sampling.narrows:
                place = torch.full_like(among[i], len(self.found.completions[row]))
                self.kept[row].append(torch.stack((place, among[i])))
            self.found.completions[row].append(token)
            self.found.sampler[row].append(logp[i])
            self.found.ended[row] = token in self.request.ends

    def feed(self) -> None:
        """Compute the logits after the tokens drawn last."""
        going = [i for i, row in enumerate(self.running) if not self.found.ended[row]]
        if 2 * len(going) <= len(self.running) and not self.request.together:
            rows = torch.tensor(going, device=self.device, dtype=torch.int64)
            self.drawn = self._take(rows, self.drawn)
            self.running = [self.running[i] for i in going]
        at = self.caches[0].length
        self.logits, chosen = read(self.decoder, self.drawn[:, None], self.caches)
        self._record(chosen, at)

    def finished(self) -> Rollout:
        """The completions, with their experts and the tokens that they were sampled among."""
        every = [experts.cpu() for experts in self.experts]
        for row, (prompt, completion) in enumerate(zip(self.found.prompts, self.found.completions, strict=True)):
            inside = slice(self.longest - len(prompt), self.longest + len(completion) - 1)
            if every:
                self.found.experts.append([experts[row, inside].clone() for experts in every])
            if self.request.sampling.narrows:
                self.found.kept.append(torch.cat(self.kept[row], 1))
        return self.found
