"""One layer of a decoder: its parts, what they remember, and what they pass on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention, empty_cache
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.layer import HeldTails, LayerCache
from blockwright.blocks.convolution import Convolution
from blockwright.blocks.ffn import FFN
from blockwright.blocks.forward_pass import Carry, Losses, Pass
from blockwright.blocks.gating.base import Routing, with_losses
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.memory import Memory
from blockwright.blocks.norm import Norm
from blockwright.blocks.residual.base import Residual
from blockwright.registry import BlockError

OPTIONAL_PARTS = ("memory",)  # the parts that a layer may be without
LAYER_PARTS = ("attention", "ffn", "residual", *OPTIONAL_PARTS)  # every other kind is a child


class Layer(nn.Module):
    """One attention and one feed-forward block, connected by a residual block; and a memory, if any."""

    def __init__(self, attention: Attention, ffn: FFN, residual: Residual, memory: Memory | None = None) -> None:
        super().__init__()
        self.attention, self.ffn, self.residual, self.memory = attention, ffn, residual, memory
        for name, block in self.named_modules():
            if isinstance(block, Convolution):
                block.place = name

    @property
    def convolutions(self) -> list[Convolution]:
        """Those of all its parts."""
        return [block for block in self.modules() if isinstance(block, Convolution)]

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        """An empty cache of what the parts of the layer remember: its attention, memory and convolutions.

        Args:
            batch, length, dtype, device, bits: as of ``Attention.new_cache``; the attention alone is quantised

        Raises:
            BlockError: the attention has no cache with these bits, or none that another part can join
            NotImplementedError: a part has no ``new_cache``
        """
        cache = empty_cache(self.attention, batch, length, dtype, device, bits)
        parts = {"attention": cache}
        if self.memory is not None and self.memory.reach != 0:
            parts["memory"] = self.memory.new_cache(batch, length, dtype, device)
        if tails := {block.place: (block.tail, dtype) for block in self.convolutions}:
            parts["tails"] = HeldTails(batch, length, tails, device)
        if len(parts) == 1:
            return cache
        if not isinstance(cache, Cache):
            rule = f"{type(cache).__name__} is no Cache of blocks/cache, and what other parts remember cannot join it"
            raise BlockError("attention", type(self.attention).__name__, rule, "Leave memory and convolutions out")
        return LayerCache(parts)

    def forward(
        self, x: Tensor, given: Pass, ends: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor, Routing | None, Carry]:
        """x → x after this layer, the routing of the tokens if the ffn routes or there are losses, and what the next
        layer is given as ``carry``.

        ``ends`` says whether the layer is the first of its stack, and whether it is the last: x is [B,T,D] at both, and
        in between what the residual block makes of it.
        """
        # Its own: a layer that is computed again for the gradient finds what it found before. Made here, within what
        # sharding strategies wrap: they rebuild every dict that they pass on.
        carry: Carry = dict(given.carry or {})
        losses: Losses = {}
        given, of_memory = self._passes(given._replace(carry=carry, losses=losses))
        routing: Routing | None = None

        def attend(h: Tensor, places: Tensor | None = None) -> Tensor:
            assert places is None, "attention mixes all tokens"
            return self.attention(h, given) if given.share is None else given.share.attend(self.attention, h, given)

        def feed(h: Tensor, places: Tensor | None = None) -> Tensor:
            nonlocal routing
            y, routing = self._feed(h, given, places)
            return y

        first, last = ends  # here, where strategies that shard a layer gather its weights
        x = self._recall("before", self.residual.open(x) if first else x, of_memory)
        further = self.residual.losses(x, given.real) if self.training else {}
        x = self.residual(x, attend, feed, given)
        x = self.residual.leave(self._recall("after", x, of_memory))
        if isinstance(given.tails, HeldTails):
            given.tails.end(x.shape[1])
        return self.residual.close(x, given) if last else x, with_losses(routing, {**losses, **further}), carry

    def _passes(self, given: Pass) -> tuple[Pass, Pass]:
        """The pass for its attention and ffn, and that for its memory, each with the cache of the part."""
        held = given.cache.parts if isinstance(given.cache, LayerCache) else {"attention": given.cache}
        tails: Any = held.get("tails") if given.share is None else given.share.tails(given.segments)
        given = given._replace(cache=held["attention"], tails=tails)
        return given, given._replace(cache=held.get("memory"))

    def _feed(self, h: Tensor, given: Pass, places: Tensor | None) -> tuple[Tensor, Routing | None]:
        """The ffn of all tokens, of those at ``places``, or of the last ones that are needed: 0 for the others."""
        if places is not None:
            return self.ffn(h, given.at(places))
        if (n := given.needed or h.shape[1]) >= h.shape[1]:
            return self.ffn(h, given)
        y, routing = self.ffn(h[:, -n:], given.of_last(n))
        return F.pad(y, (0, 0, h.shape[1] - n, 0)), routing

    def _recall(self, place: str, x: Tensor, given: Pass) -> Tensor:
        """x with what the memory adds to it at a place."""
        if self.memory is None or self.memory.place != place:
            return x
        return x + (self.memory(x, given) if given.share is None else given.share.recall(self.memory, x, given))


# --- multi-token prediction -------------------------------------------------------------------------------------------


def later_targets(targets: Tensor, segments: Tensor | None, k: int) -> Tensor:
    """Targets of depth k: targets [B,T] and document ids [B,T] → [B,T−k], −100 across documents."""
    aim = targets[:, k:]
    return aim if segments is None else aim.masked_fill(segments[:, k:] != segments[:, :-k], IGNORED)


class MTP(nn.Module):
    """One depth of multi-token prediction.

    DeepSeek-V3, arXiv 2412.19437, §2.2: h'_i = W [norm(embedding of token i+k); norm(h_i)], one decoder layer, a norm,
    and the main model's head, which predicts token i+k+1. Embedding and head are the main model's own.

    The order inside the concatenation is that of the released weights (``eh_proj``): embedding first, where the paper's
    equation has the hidden state first. h_i of depth 1 is the main model's state after its final norm, which is what
    vLLM and transformers use; the paper does not specify it. The input of depth k + 1 from depth k is normalised too.
    Its layer opens and closes residual streams of its own, and is the first in depth for what layers carry.

    Args:
        embedding_norm: of the embedding, ``enorm``
        hidden_norm: of the hidden state, ``hnorm``
        project: [D,2D], ``eh_proj``
        layer: one decoder layer, built like the last of the main model
        norm: before the head, ``shared_head.norm``
    """

    def __init__(
        self, embedding_norm: Norm, hidden_norm: Norm, project: nn.Linear, layer: nn.Module, norm: Norm
    ) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.project = embedding_norm, hidden_norm, project
        self.layer, self.norm = layer, norm

    def forward(self, embedded: Tensor, hidden: Tensor, given: Pass) -> tuple[Tensor, Routing | None]:
        """Embeddings [B,T,D] of the tokens, and the states [B,T,D] of those k before → states [B,T,D]."""
        x = self.project(torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), -1))
        x, routing, _ = self.layer(x, given._replace(embedded=x))
        return self.norm(x), routing
