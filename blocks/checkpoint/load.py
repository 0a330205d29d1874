"""Rebuild a decoder from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path

import torch

from blocks.checkpoint.read import read_checkpoint
from blocks.checkpoint.weights import weights_of
from blocks.compose import compose
from blocks.decoder import Decoder


def load_decoder(path: str | Path, *, device: torch.device | str = "cpu") -> Decoder:
    """Rebuild the decoder of a checkpoint, in evaluation mode.

    Args:
        path: of the checkpoint, or of a run's folder for its last one
        device: of the weights

    Raises:
        ConfigError: the file cannot be read safely, or its composition names a block that is not registered here
    """
    last = Path(path, "checkpoints", "last.ckpt")
    checkpoint = read_checkpoint(last if last.exists() else path)
    decoder = compose(checkpoint["hyper_parameters"]["model"], device=device)
    decoder.load_state_dict(weights_of(checkpoint))
    return decoder.eval()
