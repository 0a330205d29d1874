"""Our own models, through the public interface: ``compose``, ``hidden``, ``logits``, ``nll``, ``new_caches``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.models.base import Model, random_like
from benchmarks.race import Contender
from benchmarks.shapes import Shape, composition
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose


class Ours(Model):
    """A composed decoder."""

    def __init__(self, shape: Shape, contender: Contender) -> None:
        self.module = self.decoder = compose(composition(shape, contender.family))
        self.caches: list[Cache] = []

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = self.decoder.hidden(tokens)
        return self.decoder.nll(hidden, targets) / targets.numel()

    def compile(self) -> None:
        for layer in self.decoder.layers:
            layer.compile()

    def begin(self, batch: int, length: int) -> None:
        self.caches = self.decoder.new_caches(batch, length)

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.decoder.logits(self.decoder.last_hidden(tokens, self.caches)[:, -1])

    def fill(self, context: int) -> None:
        for cache in self.caches:
            slots = (random_like((b.shape[0], context, *b.shape[2:]), b) for b in cache.buffers.values())
            cache.append(*slots)

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens)

    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)


def cache_formula(shape: Shape, family: str, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of a cache: C + R numbers per token and layer for MLA, else keys and values of every KV head."""
    head = shape.d_model // shape.n_heads
    heads = shape.kv_heads if family == "mixtral" else shape.n_heads
    numbers = shape.latent + shape.rope if family == "mla_moe" else 2 * heads * head
    return numbers * shape.n_layers * batch * length * dtype.itemsize
