"""``curves.json`` of a run: its training and validation curves, and its cost per token.

Steps are optimizer steps; ``tokens_per_step`` converts them to tokens, ``flops_per_token`` those to FLOPs. The
validations are those during training, all on the same text; a run without any has its final one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes_per_token, training_flops_per_token
from blockwright.training.writing import write_text

FILE = "curves.json"
Curve = Sequence[tuple[int, float]]


def costs(model: Mapping[str, Any], length: int) -> dict[str, float | None]:
    """Cost of one token, measured on the meta device.

    Args:
        model: a composition
        length: T, tokens of its training sequences

    Returns:
        ``flops_per_token`` of training, and ``cache_bytes_per_token`` in fp32, of a sequence of this length;
        None if a plug-in's block cannot be measured
    """
    found: dict[str, float | None] = {"flops_per_token": None, "cache_bytes_per_token": None}
    try:
        decoder = compose(model, device="meta")
        length = min(length, decoder.config["max_positions"])
        found["flops_per_token"] = training_flops_per_token(decoder, length)
        found["cache_bytes_per_token"] = cache_bytes_per_token(decoder, length, torch.float32)
    except NotImplementedError:  # an attention without a cache
        pass
    except Exception as error:  # must not end a finished training
        rank_zero_warn(f"no costs in {FILE}: {type(error).__name__}: {error}")
    return found


def tokens_per_step(trainer: L.Trainer) -> int | None:
    """Tokens per optimizer step, over all ranks; None if the data module does not define it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    windows, length = getattr(data, "batch_size", None), getattr(data, "sequence_length", None)
    return None if windows is None or length is None else windows * length * trainer.accumulate_grad_batches


def write(
    directory: Path,
    train: Curve,
    val: Curve,
    tokens: int | None,
    costs: Mapping[str, float | None],
    shares: Mapping[str, torch.Tensor],
) -> None:
    """Write ``curves.json`` atomically."""
    load = {layer: [round(share, 6) for share in found.tolist()] for layer, found in shares.items()}
    document = {"tokens_per_step": tokens, "train": train, "val": val, **costs, "expert_load": load}
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / FILE, json.dumps(document))
