"""Check that the weights of a checkpoint fit a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.weights import raw_weights
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.model_config import reread
from blockwright.registry import ConfigError


def check_fits(checkpoint: dict[str, Any], decoder: Decoder, path: str | Path) -> None:
    """Refuse a checkpoint whose weights do not fit a model, before either is allocated.

    Args:
        checkpoint: from ``read_checkpoint``
        decoder: on the meta device, with its adapters
        path: of the file, for the error message

    Raises:
        ConfigError: names the first weight that differs, and the parts of the composition that do
    """
    theirs = {k: tuple(v.shape) for k, v in raw_weights(checkpoint).items()}
    ours, model = {k: tuple(v.shape) for k, v in decoder.state_dict().items()}, decoder.config
    unlike = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if unlike:
        old = reread(checkpoint["hyper_parameters"]["model"])
        changed = ", ".join(f"model.{key}" for key in {**old, **model} if old.get(key) != model.get(key)) or "adapter"
        shapes = f"{theirs.get(unlike[0], 'missing')} there and {ours.get(unlike[0], 'missing')} here"
        rule = f"was trained with another model: {unlike[0]} is {shapes}"
        raise ConfigError(
            "ckpt_path", str(path), rule, f"Compose the same model (other now: {changed}), or start afresh"
        )
