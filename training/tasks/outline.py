"""The model of a run as it is trained, without memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.training.starts.base import Start
from blockwright.training.tasks.frozen import freeze


def outline(model: Mapping[str, Any], starts: Iterable[Start], frozen: Sequence[str] | None) -> Decoder:
    """The decoder on the meta device, with what its starts attach and its frozen parts, which a checkpoint must fit.

    Raises:
        ConfigError: a pattern matches nothing
    """
    decoder = compose(model, device="meta")
    for start in starts:
        start.attach(decoder)
    freeze(decoder, frozen or ())
    return decoder
