"""A decoder with some blocks of another, to see what each operator of a surgery changes; they share their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from blockwright.blocks.base import Block
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import LAYER_PARTS, Layer
from blockwright.plugins.surgery.growth.base import Growth

FRAME = ("embedding", "position", "norm", "head")
LOOP = "loop"


def silence(layer: Layer) -> None:
    """Bring to zero what a layer adds to the residual stream."""
    for block in layer.modules():
        for name in block.residual_outputs if isinstance(block, Block) else ():
            block.get_parameter(name).zero_()
            bias = dict(block.named_parameters()).get(name.replace("weight", "bias"))
            if bias is not None:
                bias.zero_()


@torch.no_grad()
def grown(old: Decoder, n_layers: int, growth: Growth) -> Decoder:
    """The old decoder at another depth, and otherwise as it was; itself at its own."""
    there = len(old.layers)
    if there == n_layers:
        return old
    silent = growth.silent(there, n_layers)
    sources = enumerate(growth.sources(there, n_layers))
    layers = [copy.deepcopy(old.layers[j]) if i in silent else old.layers[j] for i, j in sources]
    for i in silent:
        silence(layers[i])  # type: ignore[arg-type]
    return old.with_layers(layers)


def mixed(old: Decoder, new: Decoder, paths: Iterable[str]) -> Decoder:
    """The old decoder with some blocks of the new one, which has as many layers.

    Args:
        old, new: before and after the surgery
        paths: of the blocks of the new decoder: ``norm``, ``layers.3.attention``
    """
    taken = set(paths)
    layers = (
        Layer(*(getattr(theirs if f"layers.{i}.{part}" in taken else ours, part) for part in LAYER_PARTS))
        for i, (ours, theirs) in enumerate(zip(old.layers, new.layers, strict=True))
    )
    probe = old.with_layers(layers, new.loop if LOOP in taken else old.loop)
    for name in taken.intersection(FRAME):
        setattr(probe, name, getattr(new, name))
    if "embedding" in taken:
        probe.embedding_scale = new.embedding_scale
    if "logit_softcap" in taken:
        probe.logit_softcap = new.logit_softcap
    return probe
