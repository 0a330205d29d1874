"""The decoder: embeddings → layers → norm → head, made of built parts. Knows no names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blocks.attention.base import Attention, empty_cache
from blocks.base import Block
from blocks.cache import Cache
from blocks.ffn.base import FFN
from blocks.gating.base import Routing
from blocks.kernels.choice import choose
from blocks.kernels.cross_entropy import IGNORED
from blocks.kernels.few_rows import linear
from blocks.mtp import MTP, later_targets
from blocks.norm.base import Norm
from blocks.position.base import Position
from blocks.residual.base import Residual
from registry import BlockError


class Layer(nn.Module):
    """One attention and one feed-forward block, wired by a residual block."""

    def __init__(self, attention: Attention, ffn: FFN, residual: Residual) -> None:
        super().__init__()
        self.attention, self.ffn, self.residual = attention, ffn, residual

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        positions: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x [B,T,D] of token ids [B,T] → [B,T,D], and the routing of its tokens if the ffn routes any."""
        routing: Routing | None = None

        def attend(h: Tensor) -> Tensor:
            return self.attention(h, positions, segments=segments, cache=cache)

        def feed(h: Tensor) -> Tensor:
            nonlocal routing
            y, routing = self.ffn(h, tokens)
            return y

        return self.residual(x, attend, feed), routing


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: the composition it is made from, as plain types; a checkpoint that holds it rebuilds the model
        embedding: [V,D]
        position: what is added to the embeddings (a block that does nothing, for rotary and the like)
        layers: in order of depth
        norm: after the last layer
        head: [V,D] output projection; None ties it to the embedding
        mtp: depths of multi-token prediction, used by ``mtp_nll`` alone
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        embedding: nn.Embedding,
        position: Position,
        layers: Sequence[Layer],
        norm: Norm,
        head: nn.Linear | None,
        mtp: Sequence[MTP] = (),
    ) -> None:
        super().__init__()
        self.config = dict(config)
        self.embedding_scale = config["d_model"] ** 0.5 if config["scale_embeddings"] else 1.0
        self.logit_softcap: float | None = config["logit_softcap"]
        self.embedding, self.position, self.norm, self.head = embedding, position, norm, head
        self.layers, self.mtp = nn.ModuleList(layers), nn.ModuleList(mtp)
        self.choose_kernels()

    def choose_kernels(self, wishes: Mapping[str, str] | None = None) -> Decoder:
        """Choose, for the device that the weights are on, how everything is computed; kept when they move.

        Args:
            wishes: kernel → implementation where the automatic choice is not wanted (blocks/kernels/choice.py)
        """
        self._wishes = dict(wishes or {})
        self.kernels = choose(self.embedding.weight.device, self._wishes)
        for module in self.modules():
            if isinstance(module, Block):
                module.kernels = self.kernels
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)  # .to(), .cuda(), .to_empty(): another device has other kernels
        return self.choose_kernels(self._wishes)

    @property
    def output_weight(self) -> Tensor:
        """[V,D], the head's matrix or, tied, the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Tokens [B,T] → logits [B,T,V] for the token after each. Arguments as in ``hidden``."""
        return self.logits(self.hidden(tokens, positions, segments, caches)[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [...,D] → [...,V]."""
        logits, cap = linear(hidden, self.output_weight), self.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def look_up(self, tokens: Tensor) -> Tensor:
        """Token ids [B,T] → their embeddings [B,T,D], scaled where the model scales them."""
        x = self.embedding(tokens)
        return x * self.embedding_scale if self.embedding_scale != 1.0 else x

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids [B,T] at positions [B|1,T] → what the first layer gets, [B,T,D]."""
        return self.position.embed(self.look_up(tokens), positions)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing | None]]:
        """Everything but the head.

        Args:
            tokens: [B,T] int64. With ``embedded`` they are not looked up, but a gate that routes by id reads them
            positions: [B|1,T] of each token in its document; None counts on from what the caches hold
            segments: [B,T] document ids of packed sequences
            caches: one a layer, from ``new_caches``; the tokens are appended to them
            embedded: [B,T,D] in place of ``look_up(tokens)``, e.g. with an image's patches where its placeholders
                stand. Positions are added to it; it is not scaled, since only ``look_up`` scales

        Returns:
            hidden states [B,T,D] and, for each layer, how it routed the tokens (None for a dense one)
        """
        if positions is None:
            positions = _next_positions(tokens, caches[0] if caches else None)
        x = self.position.embed(self.look_up(tokens) if embedded is None else embedded, positions)
        routings: list[Routing | None] = []
        for i, layer in enumerate(self.layers):
            x, routing = layer(x, tokens, positions, segments, caches[i] if caches else None)
            routings.append(routing)
        return self.norm(x), routings

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood in nats of targets [B,T] (−100: not scored) given hidden [B,T,D]."""
        return self.nll_and_z(hidden, targets)[0]

    def nll_and_z(self, hidden: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """``nll`` plus z_loss · Σ log² Z over scored tokens, and that sum by itself, without gradient."""
        given = (hidden.flatten(0, 1), self.output_weight, targets.flatten())
        return self.kernels.nll_and_z(*given, softcap=self.logit_softcap, z_loss=z_loss)

    def mtp_nll(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Routing | None]]:
        """What multi-token prediction loses.

        Args:
            hidden: [B,T,D] of the main model
            tokens, targets: [B,T]; the target of a token is the one after it
            positions: [B|1,T]; None counts from 0
            segments: [B,T]; nothing is predicted across documents

        Returns:
            for each depth, the summed nll in nats and the number of scored targets, 0 and 0 where the sequence ends
            before it; how its layer routed
        """
        positions = _next_positions(tokens, None) if positions is None else positions
        losses: list[tuple[Tensor, Tensor]] = []
        routings: list[Routing | None] = []
        for k, depth in enumerate(self.mtp, start=1):
            if tokens.shape[1] <= k:  # no token has one k places after it
                zero = torch.zeros((), dtype=torch.float32, device=hidden.device)
                losses.append((zero, torch.zeros_like(targets[0, 0])))
                routings.append(None)
                continue
            # Depth k pairs the state of token i with the embedding of token i+k, and predicts token i+k+1.
            later, inner = tokens[:, k:], None if segments is None else segments[:, :-k]
            aim = later_targets(targets, segments, k)
            embedded = self.embed(later, positions[:, k:])
            hidden, routing = depth(embedded, hidden[:, : later.shape[1]], later, positions[:, :-k], inner)
            losses.append((self.nll(hidden, aim), (aim != IGNORED).sum()))
            routings.append(routing)
        return losses, routings

    def new_caches(
        self, batch: int, length: int, bits: int | None = None, padding: Tensor | None = None
    ) -> list[Cache]:
        """An empty memory of ``length`` tokens for each layer, in the embedding's dtype and on its device.

        Args:
            bits: 8, 6 or 4 to keep numbers quantised; None keeps them as they are
            padding: [B] tokens in front of each row that stand for nothing, counted in ``length``: rows of unequal
                length, padded on the left, give what each gives alone

        Raises:
            BlockError: ``bits`` are none of these, or a guest's attention has caches without bits or padding
            NotImplementedError: an attention of this decoder has no ``new_cache``
        """
        like = self.embedding.weight
        made = (batch, length, like.dtype, like.device, bits)
        caches = [empty_cache(layer.attention, *made) for layer in self.layers]  # type: ignore[arg-type]
        if padding is not None:
            for cache in caches:
                if not isinstance(cache, Cache):
                    rule = f"{type(cache).__name__} is no blocks.cache.Cache, and knows of no padding"
                    raise BlockError("padding", padding.tolist(), rule, "Give rows of one length")
                cache.padding = padding
        return caches


def _next_positions(tokens: Tensor, cache: Cache | None) -> Tensor:
    """[B|1,T]: where tokens [B,T] stand, counting on from what a cache holds and leaving its padding out."""
    past = 0 if cache is None else cache.length
    positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    padding = cache.padding if isinstance(cache, Cache) else None  # a guest's cache may be of its own kind
    return positions if padding is None else (positions - padding[:, None]).clamp(min=0)
