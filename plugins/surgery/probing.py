"""Two decoders on the same random tokens: how far apart their logits are, over the logits' scale, in fp32."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import LAYER_PARTS, Layer
from blockwright.blocks.precision import matmul_precision, without_autocast
from blockwright.plugins.surgery.growth import Growth

SHORT, PACKED, LONG, LONGEST = 7, 97, 512, 2048  # tokens of a sequence
BEYOND = 65  # tokens past a difference that only longer sequences show
FEWEST = 32  # tokens that say something
FLOPS = 4e12  # of all comparisons together, some seconds on a few cores


@dataclass(frozen=True)
class Batch:
    """Random tokens.

    Args:
        tokens: [B,T]
        positions, segments: [B,T] of documents packed into rows; None for whole sequences
    """

    tokens: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None


def random_batches(old: Decoder, new: Decoder, times: int, reach: int = 0, seed: int = 0) -> list[Batch]:
    """Tokens on which two decoders are compared: two short sequences, three packed documents, and a long sequence.

    Args:
        old, new: no sequence is longer than either reads
        times: how often a decoder will read them
        reach: tokens that the long sequence exceeds, where that can be computed: a window that differs
        seed: of the tokens

    Returns:
        none where they would take too long on any machine without an accelerator, or the decoders are on meta
    """
    if old.embedding.weight.is_meta or new.embedding.weight.is_meta:
        return []
    most = min(old.config["max_positions"], new.config["max_positions"])
    size = max(sum(p.numel() for p in decoder.parameters()) for decoder in (old, new))
    budget = int(FLOPS / (2 * size * max(times, 1)))
    if budget < FEWEST:
        return []
    long = min(most, max(LONG, min(reach + BEYOND, LONGEST)), max(FEWEST, budget // 2))
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, length: int) -> Tensor:
        return _of_text(torch.randint(old.config["vocab_size"], (rows, length), generator=generator), old, new)

    found = [Batch(draw(1, long))]
    if budget >= long + PACKED:
        found.append(_packed(draw(1, min(most, PACKED))))
    if budget >= long + PACKED + 2 * SHORT:
        found.append(Batch(draw(2, min(most, SHORT))))
    return found


def _packed(tokens: Tensor) -> Batch:
    """Three documents in one row, each with positions of its own."""
    length = tokens.shape[1]
    first, second = length // 5, length // 2
    place = torch.arange(length)
    document = (place >= first).long() + (place >= second)
    begins = torch.tensor((0, first, second), dtype=torch.int64)[document]
    return Batch(tokens, (place - begins)[None], document[None])


def _of_text(tokens: Tensor, *decoders: Decoder) -> Tensor:
    """The place of an input becomes another token: its decoder would look for content there."""
    for block in (block for decoder in decoders for block in decoder.inputs.values()):
        tokens = tokens.where(tokens != block.token, (block.token + 1) % decoders[0].config["vocab_size"])
    return tokens


@torch.no_grad()
def read(decoder: Decoder, batches: list[Batch]) -> list[Tensor]:
    """The logits [B,T,V] of each batch, in evaluation mode."""
    with _evaluated(decoder), matmul_precision("highest"), without_autocast():  # whatever training has chosen
        return [decoder(batch.tokens, batch.positions, batch.segments) for batch in batches]


def distance(before: list[Tensor], after: list[Tensor]) -> float | None:
    """Largest difference of a logit over the largest logit before; None if there are none.

    Logits that are no numbers are infinitely far.
    """
    if not before:
        return None
    pairs = zip(before, after, strict=True)
    largest = max(float((b - a).abs().nan_to_num(math.inf, math.inf).max()) for a, b in pairs)
    scale = max(float(a.abs().nan_to_num(0.0, math.inf).max()) for a in before)
    if not largest or not math.isfinite(largest):
        return largest
    return largest / scale if scale else math.inf


@contextmanager
def _evaluated(decoder: Decoder) -> Iterator[None]:
    """In evaluation mode, and afterwards as before."""
    before = {module: module.training for module in decoder.modules()}
    for module in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


# --- a decoder with some blocks of another ----------------------------------------------------------------------------


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
