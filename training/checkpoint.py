"""From a checkpoint file back to a decoder and its tokenizer, with no YAML at hand and no code of the file's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blocks.compose import compose
from blocks.decoder import Decoder
from registry import ConfigError

PREFIX = "decoder."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, loaded under ``weights_only=True``.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it holds more than plain types and tensors
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError("ckpt_path", str(path), "is no checkpoint file", "Look under logs/ for a *.ckpt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several classes for a truncated, foreign or hostile file
        reason = str(error).splitlines()[0]
        raise ConfigError("ckpt_path", str(path), f"cannot be loaded safely ({reason})", "Use another one") from None
    if "model" not in checkpoint.get("hyper_parameters", {}):
        raise ConfigError("ckpt_path", str(path), "holds no model composition", "Use a checkpoint of train.py")
    return checkpoint


def load_decoder(path: str | Path, *, device: torch.device | str = "cpu") -> Decoder:
    """Rebuild the decoder of a checkpoint, in evaluation mode.

    Raises:
        ConfigError: the file cannot be read safely, or its composition names a block that is not registered here
    """
    checkpoint = read_checkpoint(path)
    decoder = compose(checkpoint["hyper_parameters"]["model"], device=device)
    weights = checkpoint["state_dict"]
    decoder.load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)})
    return decoder.eval()
