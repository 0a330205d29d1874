"""The model of a run as it is trained, without memory: on the meta device, with parts that are not trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.training.patterns import matching
from blockwright.training.starts import Start


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


def freeze(decoder: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters that match any pattern from training.

    Raises:
        ConfigError: a pattern matches no parameter
    """
    parameters = dict(decoder.named_parameters())
    for name in matching(parameters, patterns, "task.frozen"):
        parameters[name].requires_grad_(False)
