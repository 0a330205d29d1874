"""How many tokens a node generates in a second at most: weights and caches fill its memory, and each token reads both.

One step of decoding is a new token of every sequence. It reads all weights (with so many sequences every expert is
visited) and all caches; products take the time of the slower of reading and computing, attention likewise. The batch is
what the memory holds beside the weights. Left out: prefill, links between the GPUs, sequences of unequal length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.cost import cache_bytes, count_parameters
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.blocks.sample import alike
from blockwright.lab.card import in_bytes
from blockwright.plugins.planner.hardware import Coefficients, Hardware
from blockwright.plugins.planner.memory import USABLE
from blockwright.registry import BlockError, ConfigError

EXACT = {64: torch.float64, 32: torch.float32, 16: torch.bfloat16}  # bits → dtype of exact caches


@dataclass(frozen=True)
class Generation:
    """The best a node does.

    Args:
        batch: sequences at once
        weights, caches: bytes, of all GPUs
        products, attention: seconds of a step, each by what it waits for (``reads`` or ``computes``)
        tokens_per_second: of the node
    """

    batch: int
    weights: float
    caches: float
    products: dict[str, float]
    attention: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of a step: products and attention each wait for the slower of reading and computing."""
        return max(self.products.values()) + max(self.attention.values())

    @property
    def least_seconds(self) -> float:
        """The roofline of a step: all reading and all computing overlap."""
        return max(self.products[cause] + self.attention[cause] for cause in self.products)

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


def generation(
    decoder: Decoder,
    hardware: Hardware,
    fitted: Coefficients,
    *,
    gpus: int = 8,
    context: int = 4096,
    weight_bits: float = 16,
    cache_bits: float = 16,
    batch: int | None = None,
) -> Generation:
    """The throughput of a batch.

    Args:
        decoder: on the meta device
        context: tokens in each cache, on average
        weight_bits, cache_bits: of a number; see ``bytes_of_one`` for what a cache stores besides
        batch: sequences; None: as many as the memory holds

    Raises:
        ConfigError: the weights and one cache do not fit, or there are no caches and no ``batch``
    """
    counted = count_parameters(decoder)
    weights = (counted.total - counted.families["mtp"]) * weight_bits / 8
    cache = bytes_of_one(decoder, context, weight_bits, cache_bits)
    batch = batch or _most(USABLE * gpus * hardware.memory, weights, cache, gpus)
    short, long = (_flops(decoder, n) for n in (1, context))
    peak, faster = gpus * hardware.bf16 * hardware.sustained * fitted.dense, fitted.fp8 if weight_bits <= 8 else 1.0
    read = gpus * hardware.hbm
    products = {"reads": weights / read, "computes": batch * short / (peak * faster)}
    attention = {"reads": batch * cache / read, "computes": batch * (long - short) / peak}
    return Generation(batch, weights, batch * cache, products, attention)


def _most(room: float, weights: float, cache: float, gpus: int) -> int:
    """Sequences whose caches fit beside the weights."""
    if not cache:
        rule = "remembers nothing of a token, so no memory limits how many sequences are generated at once"
        raise ConfigError("model.attention", "none", rule, "Plan a model that has a token mixer")
    if (batch := int((room - weights) // cache)) < 1:
        rule = (
            f"have {in_bytes(room)} for weights ({in_bytes(weights)}) and the cache of one sequence ({in_bytes(cache)})"
        )
        remedy = "Use more GPUs or larger ones, a shorter length, or lower weights.bits and cache.bits"
        raise ConfigError("gpus", gpus, rule, remedy)
    return batch


def bytes_of_one(decoder: Decoder, context: int, weight_bits: float, cache_bits: float) -> float:
    """Bytes of the caches of one sequence, as they are made here: quantised ones (8, 6 or 4 bits) have scales too, and
    states of recurrent mixers keep the dtype of the weights. At other bits every number takes as many, without scales.

    Args:
        decoder: on the meta device
        context: tokens in each cache
        weight_bits, cache_bits: of a number

    Raises:
        ConfigError: an attention has no cache of so many bits
    """
    if cache_bits in EXACT:
        return cache_bytes(decoder, context, EXACT[int(cache_bits)])
    if cache_bits in BITS:
        try:
            return cache_bytes(decoder, context, EXACT.get(int(weight_bits), torch.bfloat16), int(cache_bits))
        except BlockError as error:
            raise ConfigError("cache.bits", cache_bits, error.rule, "Leave cache.bits out") from None
    total, of_one = 0.0, (1, context, torch.bfloat16, torch.device("meta"), None)
    for group in alike(decoder.layers):
        layer: Any = decoder.layers[group[0]]
        cache = layer.new_cache(*of_one)
        total += decoder.visits(group) * cache.nbytes * (cache_bits / 16 if getattr(cache, "quantises", True) else 1)
    return total


def _flops(decoder: Decoder, context: int) -> int:
    """Of one token that is decoded behind ``context`` − 1 others; alike layers are counted once."""
    around = _decoded(decoder.with_layers([]), context)
    layers = [
        (decoder.visits(group), decoder.with_layers([decoder.layers[group[0]]])) for group in alike(decoder.layers)
    ]
    return around + sum(times * (_decoded(probe, context) - around) for times, probe in layers)


def _decoded(decoder: Decoder, context: int) -> int:
    caches = decoder.new_caches(1, context)
    for cache in caches:
        cache.length = context - 1
    token, place = (torch.full((1, 1), n, dtype=torch.long, device="meta") for n in (0, context - 1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(token, place, caches=caches)
    return counter.get_total_flops()
