"""The model of a run as it is trained, without memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.training.lora import Lora
from blockwright.training.tasks.frozen import freeze


def outline(model: Mapping[str, Any], adapter: Lora | None, frozen: Sequence[str] | None) -> Decoder:
    """The decoder on the meta device, with its adapters and frozen parts: what a checkpoint of the run must fit.

    Raises:
        ConfigError: a pattern matches nothing
    """
    decoder = compose(model, device="meta")
    if adapter is not None:
        adapter.attach(decoder)
    freeze(decoder, frozen or ())
    return decoder
