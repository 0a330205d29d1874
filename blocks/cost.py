"""What a composition costs, measured on the meta device: right for blocks that nobody here has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from blocks.compose import compose
from blocks.decoder import Decoder
from blocks.experts.base import Experts


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a decoder.

    Args:
        total: all of them
        active: those that one token passes: all, with k of E routed experts
        embedding: the input embedding's, counted in both of the above
    """

    total: int
    active: int
    embedding: int


def count_parameters(decoder: Decoder) -> Parameters:
    """Total and active parameters; the share of experts a token visits is read off an actual routing."""
    total = sum(p.numel() for p in decoder.parameters())
    idle = 0
    meta = decoder if decoder.embedding.weight.is_meta else compose(decoder.config, device="meta")
    with torch.no_grad():
        routings = meta.hidden(torch.zeros(1, 1, dtype=torch.long, device="meta"))[1]
    for layer, routing in zip(decoder.layers, routings, strict=True):
        if routing is not None:
            experts = [m for m in layer.modules() if isinstance(m, Experts)]
            stacked = sum(p.numel() for m in experts for p in m.parameters())
            E, k = routing.load.shape[0], routing.experts.shape[1]
            idle += stacked * (E - k) // E
    return Parameters(total, total - idle, decoder.embedding.weight.numel())


def forward_flops_per_token(config: Mapping[str, Any], length: int) -> float:
    """FLOPs of the forward pass with the head, for one token of a sequence of ``length``; attention not halved for
    causality, a multiplication and an addition counted as two."""
    decoder = compose(config, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, length, dtype=torch.long, device="meta"))
    return counter.get_total_flops() / length
