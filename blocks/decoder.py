"""The decoder: embeddings → layers → norm → head, assembled from built parts. Knows no block names."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.layer import caches_that_fit
from blockwright.blocks.forward_pass import Carry, Losses, Pass, Share
from blockwright.blocks.gating.base import Routing, with_losses
from blockwright.blocks.input import Input, Media
from blockwright.blocks.kernels.choice import choose
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.kernels.log_probabilities import linear_log_probabilities
from blockwright.blocks.kernels.products import linear
from blockwright.blocks.layer import MTP, Layer, later_targets
from blockwright.blocks.loop import Loop
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: its composition as plain data; a checkpoint rebuilds the model from it
        embedding: [V,D]
        position: added to the embeddings (a block that does nothing, for rotary and similar)
        layers: in order of depth
        norm: after the last layer
        head: [V,D] output projection; None ties it to the embedding
        mtp: multi-token prediction depths, used by ``mtp_nll`` and drafts only
        inputs: kind → what embeds content of that kind at the places of a token; none for a model of text
        loop: visits some of the layers again; None: a pass visits each once

    Attributes:
        read_from: which weights it was loaded with, for people; None for those of a composition
    """

    read_from: str | None = None

    def __init__(
        self,
        config: Mapping[str, Any],
        embedding: nn.Embedding,
        position: Position,
        layers: Sequence[Layer],
        norm: Norm,
        head: nn.Linear | None,
        mtp: Sequence[MTP] = (),
        inputs: Mapping[str, Input] | None = None,
        loop: Loop | None = None,
    ) -> None:
        super().__init__()
        self.config = dict(config)
        self.embedding_scale = config["d_model"] ** 0.5 if config["scale_embeddings"] else 1.0
        self.logit_softcap: float | None = config["logit_softcap"]
        self.embedding, self.position, self.norm, self.head = embedding, position, norm, head
        self.layers, self.mtp = nn.ModuleList(layers), nn.ModuleList(mtp)
        for kind, block in (inputs or {}).items():
            self.add_module(kind, block)
        self.loop, self._loops = loop, loop is not None
        self.choose_kernels()

    def choose_kernels(self, overrides: Mapping[str, str] | None = None) -> Decoder:
        """Choose kernels for the device of the weights; repeated when they move.

        Args:
            overrides: kernel → implementation, instead of the automatic choice (blocks/kernels/choice.py)
        """
        self._kernel_overrides = dict(overrides or {})
        self.kernels = choose(self.embedding.weight.device, self._kernel_overrides)
        for module in self.modules():
            if isinstance(module, Block):
                module.kernels = self.kernels
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)  # .to(), .cuda(), .to_empty(): another device has other kernels
        return self.choose_kernels(self._kernel_overrides)

    def with_layers(self, layers: Iterable[nn.Module], loop: Loop | None = None) -> Decoder:
        """This decoder with other layers; it shares every other module.

        Args:
            loop: visits some of them again; None: a pass visits each once, and the loop of this decoder is only counted
        """
        probe = copy.copy(self)
        probe._modules = {**self._modules, "layers": nn.ModuleList(layers)}
        probe._loops = loop is not None
        if loop is not None:
            probe._modules["loop"] = loop
        return probe

    def with_visits(self, visits: int) -> Decoder:
        """This decoder with another number of visits of its loop, as it would be composed; it shares every weight.

        Raises:
            BlockError: it has no loop, or the number is out of range
        """
        if self.loop is None:
            raise BlockError("visits", visits, "this model visits no layer again", "Choose a model with a loop")
        other = copy.copy(self)
        other._modules = {**self._modules, "loop": self.loop.with_visits(visits)}
        written = self.config["loop"]
        node = {"name": written} if isinstance(written, str) else written
        other.config = {**self.config, "loop": {**node, "visits": visits}}
        return other

    def order(self, cached: bool = True) -> list[int]:
        """The index of each layer that a pass computes, in order: that of its caches and routings.

        Args:
            cached: whether it is a pass with caches. One without makes as many visits of a loop, but in training
        """
        if self.loop is None or not self._loops:
            return list(range(len(self.layers)))
        return self.loop.order(self._visits(self.loop, cached))

    def visits(self, layers: Iterable[int]) -> int:
        """How many layers a pass outside of training computes that are these, given their indices in the model."""
        if self.loop is None:
            return len(list(layers))
        times = Counter(self.loop.order(self.loop.visits))
        return sum(times[index] for index in layers)

    def _visits(self, loop: Loop, cached: bool) -> int:
        return loop.drawn_visits if self.training and not cached else loop.visits

    def begin_step(self, seed: int) -> None:
        """Draw what a training step draws once for all ranks and micro-batches.

        Args:
            seed: of the run and the step
        """
        if self.loop is not None:
            self.loop.begin_step(seed)

    @property
    def inputs(self) -> dict[str, Input]:
        """Kind → the input of that kind."""
        return {kind: block for kind, block in self.named_children() if isinstance(block, Input)}

    @property
    def output_weight(self) -> Tensor:
        """[V,D], the head's matrix or, if tied, the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """Tokens [B,T] → logits [B,T,V] for the token after each. Arguments as in ``hidden``."""
        return self.logits(self.hidden(tokens, positions, segments, caches, media=media)[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [...,D] → [...,V]."""
        logits, cap = linear(hidden, self.output_weight), self.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def media(self, batch: Mapping[str, Tensor]) -> Media:
        """What a batch holds beside text: the tensors under ``KIND.PART``, as read by the input of that kind.

        Raises:
            BlockError: the model has no such input
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in batch.items():
            kind, dot, part = key.partition(".")
            if dot:
                parts.setdefault(kind, {})[part] = tensor
        return {kind: self._input(kind).read(own) for kind, own in parts.items()}

    def look_up(self, tokens: Tensor, media: Media | None = None) -> Tensor:
        """Token ids [B,T] → embeddings [B,T,D], scaled if the model scales them, and those of media, which are not.

        Raises:
            BlockError: the model has no input for some of the media, or the text has more or fewer places than they
                need
        """
        x = self.embedding(tokens)
        x = x * self.embedding_scale if self.embedding_scale != 1.0 else x
        for kind, content in (media or {}).items():
            x = self._input(kind).place(x, tokens, content)
        return x

    def check_places(self, tokens: Sequence[int], media: Media | None) -> None:
        """Refuse a text whose media ``look_up`` would refuse, before anything is computed.

        Raises:
            BlockError: as there
        """
        for kind, content in (media or {}).items():
            block = self._input(kind)
            if (places := tokens.count(block.token)) != (needed := block.count(content)):
                raise block.misplaced(places, needed, content)

    def _input(self, kind: str) -> Input:
        if (block := self.inputs.get(kind)) is None:
            raise BlockError(
                kind, None, f"this model reads no {kind}", f"Choose a model with {kind}, or leave them out"
            )
        return block

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids [B,T] at positions [B|1,T] → input of the first layer, [B,T,D]."""
        return self.position.embed(self.look_up(tokens), positions)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        embedded: Tensor | None = None,
        share: Share | None = None,
        experts: Sequence[Tensor | None] | None = None,
        media: Media | None = None,
    ) -> tuple[Tensor, list[Routing | None]]:
        """Everything but the head.

        Args:
            tokens: [B,T] int64. With ``embedded`` they are not looked up, but gates that route by id read them
            positions: [B|1,T] of each token in its document; None continues from the caches
            segments: [B,T] document ids of packed sequences; −1 is padding, which is in no load and no loss
            caches: one per visited layer, from ``new_caches``; the tokens are appended to them
            embedded: [B,T,D] in place of ``look_up(tokens)``. Positions are added to it; it is not scaled, since only
                ``look_up`` scales
            share: this rank's tokens, where those of a sequence are spread over ranks: the other arguments are then of
                whole sequences, without caches, and what is returned is of this rank's tokens
            experts: for each visited layer those of an earlier routing, to be weighed again (``Gating.forward``)
            media: all those of the batch, for ``look_up``

        Returns:
            hidden states [B,T,D] and, for each visited layer (``order``), the routing of the tokens (None for a dense
            one without losses)
        """
        states, routings = self._states(tokens, positions, segments, caches, embedded, share, experts, media)
        return self._leave(states), routings

    def exits(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        share: Share | None = None,
        media: Media | None = None,
    ) -> tuple[list[Tensor], list[Routing | None]]:
        """``hidden`` after each visit of a loop from which tokens may leave, the last one last."""
        states, routings = self._states(tokens, positions, segments, None, None, share, None, media)
        return [self.norm(state) for state in states], routings

    def _leave(self, states: Sequence[Tensor]) -> Tensor:
        """The normalised states with which tokens leave; in training all make every visit."""
        if self.loop is None or self.loop.exit is None or self.training or not self._loops:
            return self.norm(states[-1])
        return self.norm(self.loop.exit.choose(states, self.norm))

    def _states(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        caches: Sequence[Cache] | None,
        embedded: Tensor | None,
        share: Share | None,
        experts: Sequence[Tensor | None] | None,
        media: Media | None,
    ) -> tuple[list[Tensor], list[Routing | None]]:
        """The streams with which tokens may leave, before the last norm; arguments as in ``hidden``."""
        if positions is None:
            positions = _next_positions(tokens, caches[0] if caches else None)
        take = _whole if share is None else share.take
        own = take(tokens)
        if media:
            embedded = self.look_up(tokens, media)
        x = self.position.embed(self.look_up(own) if embedded is None else take(embedded), take(positions))
        given = Pass(positions, segments, tokens=own, share=share, made={} if caches else None)
        return self._through_layers(x, given, caches, experts)

    def last_hidden(self, tokens: Tensor, caches: Sequence[Cache], embedded: Tensor | None = None) -> Tensor:
        """``hidden`` of the last token alone, [B,1,D], which reading a prompt asks for.

        Of the tokens before it the last layer computes what its cache remembers: an attention by scores and a
        feed-forward block leave out the rest, unless a block lets later tokens change what earlier ones get, or is a
        convolution.
        """
        last: Any = self.layers[-1]
        alone = not last.convolutions and all(block.causal for block in last.modules() if isinstance(block, Block))
        positions = _next_positions(tokens, caches[0])
        x = self.position.embed(self.look_up(tokens) if embedded is None else embedded, positions)
        given = Pass(positions, tokens=tokens, made={})
        states, _ = self._through_layers(x, given, caches, None, needed=1 if alone else None)
        return self._leave([state[:, -1:] for state in states])

    def _through_layers(
        self,
        x: Tensor,
        given: Pass,
        caches: Sequence[Cache] | None,
        experts: Sequence[Tensor | None] | None,
        needed: int | None = None,
    ) -> tuple[list[Tensor], list[Routing | None]]:
        """Input of the first layer → what tokens may leave with, the output of the last one last, and the routing in
        each visited layer."""
        routings: list[Routing | None] = []
        carry: Carry = {}
        given = given._replace(embedded=x)
        order = self.order(caches is not None)

        def visit(x: Tensor, index: int) -> Tensor:
            nonlocal carry
            i = len(routings)
            last = i == len(order) - 1
            # The same for all layers where it makes no difference: a compiler makes a graph for each.
            ends = (i == 0, last) if self.layers[index].residual.reshapes else (True, True)  # type: ignore[union-attr]
            cache, chosen = caches[i] if caches else None, None if experts is None else experts[i]
            own = given._replace(cache=cache, experts=chosen, carry=carry, needed=needed if last else None)
            x, routing, carry = self.layers[index](x, own, ends)
            routings.append(routing)
            return x

        if self.loop is not None and self._loops:
            states = self.loop(x, self._visits(self.loop, caches is not None), visit, self.norm)
            routings[-1] = with_losses(routings[-1], self._exit_losses(states, given))
            return states, routings
        for index in order:
            x = visit(x, index)
        return [x], routings

    def _exit_losses(self, states: Sequence[Tensor], given: Pass) -> Losses:
        """What the exits of a loop add to the loss in training."""
        if self.loop is None or self.loop.exit is None or not self.training:
            return {}
        leave = self.loop.exit
        return leave.losses(leave.probabilities([self.norm(state) for state in states]), given.real)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood in nats of targets [B,T] (−100: not scored) given hidden [B,T,D]."""
        return self.nll_and_z(hidden, targets)[0]

    def nll_and_z(
        self, hidden: Tensor, targets: Tensor, z_loss: float = 0.0, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``nll`` plus z_loss · Σ log² Z over scored tokens, and that sum alone, without gradient.

        Args:
            weights: [B,T], factor of each token in both sums; None for 1
        """
        given = (hidden.flatten(0, 1), self.output_weight, targets.flatten())
        factors = None if weights is None else weights.flatten()
        return self.kernels.nll_and_z(*given, softcap=self.logit_softcap, z_loss=z_loss, weights=factors)

    def expected_nll(self, states: Sequence[Tensor], targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """``nll`` that tokens have on average over the visits after which they may leave.

        Args:
            states: from ``exits``, r of [B,T,D]
            targets: [B,T]
            weights: [B,T], factor of each token; None for 1
        """
        assert self.loop is not None and self.loop.exit is not None
        scored = targets != IGNORED
        aim, factors = targets.masked_fill(~scored, 0).flatten(), scored if weights is None else scored * weights
        given = (self.output_weight, aim, self.logit_softcap)
        nlls = torch.stack([-linear_log_probabilities(h.flatten(0, 1), *given).view(targets.shape) for h in states])
        return (self.loop.exit.probabilities(states) * nlls * factors).sum()

    def mtp_nll(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Routing | None]]:
        """Loss of multi-token prediction.

        Args:
            hidden: [B,T,D] of the main model
            tokens, targets: [B,T]; the target of a token is the next one
            positions: [B|1,T]; None counts from 0
            segments: [B,T]; nothing is predicted across documents
            share: as in ``hidden``; all arguments but ``hidden`` are of whole sequences

        Returns:
            for each depth, the summed nll in nats and the number of scored targets, both 0 for sequences too short for
            it, and the routing of its layer
        """
        take = _whole if share is None else share.take
        losses: list[tuple[Tensor, Tensor]] = []
        routings: list[Routing | None] = []
        for k, (states, routing) in enumerate(self.mtp_states(hidden, tokens, positions, segments, share), start=1):
            aim = take(later_targets(targets, segments, k))
            losses.append((self.nll(states, aim), (aim != IGNORED).sum()))
            routings.append(routing)
        for _ in range(len(self.mtp) - len(losses)):  # too short for these depths
            zero = torch.zeros((), dtype=torch.float32, device=hidden.device)
            losses.append((zero, torch.zeros_like(targets[0, 0])))
            routings.append(None)
        return losses, routings

    def mtp_states(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        share: Share | None = None,
    ) -> Iterator[tuple[Tensor, Routing | None]]:
        """For each depth k that sequences are long enough for, its states [B,T−k,D] and the routing of its layer;
        arguments as in ``mtp_nll``."""
        positions = _next_positions(tokens, None) if positions is None else positions
        take = _whole if share is None else share.take
        for k, depth in enumerate(self.mtp, start=1):
            if tokens.shape[1] <= k:
                return
            # Depth k pairs the state of token i with the embedding of token i+k, and predicts token i+k+1.
            later, inner = take(tokens[:, k:]), None if segments is None else segments[:, :-k]
            embedded = self.embed(later, take(positions[:, k:]))
            given = Pass(positions[:, :-k], inner, tokens=later, share=share)
            hidden, routing = depth(embedded, hidden[:, : later.shape[1]], given)
            yield hidden, routing

    def new_caches(
        self, batch: int, length: int, bits: int | None = None, padding: Tensor | None = None
    ) -> list[Cache]:
        """An empty cache for ``length`` tokens per visited layer, in the embedding's dtype and on its device.

        Args:
            bits: 8, 6 or 4 for quantised caches; None for exact ones
            padding: [B] padding tokens at the start of each row, counted in ``length``: rows of unequal length, padded
                on the left, give what each gives alone

        Raises:
            BlockError: unknown ``bits``, or a plug-in's attention has caches without bits or padding, or the caches
                take more memory than there is
            NotImplementedError: an attention of this decoder has no ``new_cache``
        """
        like = self.embedding.weight

        def make(device: torch.device) -> list[Cache]:
            made = (batch, length, like.dtype, device, bits)
            return [self.layers[i].new_cache(*made) for i in self.order()]  # type: ignore[operator]

        caches = caches_that_fit(make, batch, length, like.device)
        if padding is not None:
            for cache in caches:
                if not isinstance(cache, Cache):
                    rule = f"{type(cache).__name__} is no Cache of blocks/cache, and does not support padding"
                    raise BlockError("padding", padding.tolist(), rule, "Give rows of one length")
                cache.padding = padding
        return caches


def _whole(sequences: Tensor) -> Tensor:
    return sequences


def _next_positions(tokens: Tensor, cache: Cache | None) -> Tensor:
    """[B|1,T]: positions of tokens [B,T], continuing after those in a cache and not counting its padding."""
    past = 0 if cache is None else cache.length
    positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    padding = cache.padding if isinstance(cache, Cache) else None  # a plug-in's cache may be of its own class
    return positions if padding is None else (positions - padding[:, None]).clamp(min=0)
