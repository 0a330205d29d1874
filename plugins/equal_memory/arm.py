"""The arms of a comparison, checked on the meta device: what each needs for a sequence, and how many fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.machine import device_memory
from blockwright.lab.card import in_bytes
from blockwright.lab.match.sizing import named, read_arm
from blockwright.plugins.equal_memory.request import Bits, Request
from blockwright.registry import BlockError, ConfigError


def precision(bits: Bits) -> str:
    """``exact``, or ``6 bits``."""
    return "exact" if bits is None else f"{bits} bits"


@dataclass(frozen=True)
class Cell:
    """One arm at one precision of its caches and one length.

    Args:
        arm: its name
        bits: of a number in the caches; None for exact ones
        context: tokens in the cache of each sequence
    """

    arm: str
    bits: Bits
    context: int

    @property
    def name(self) -> str:
        """Of the arm and its precision."""
        return f"{self.arm}, {precision(self.bits)}"


@dataclass(frozen=True)
class Arm:
    """A composition.

    Args:
        name: of the arm
        model: the validated composition, as plain types
        decoder: on the meta device, in the dtype of the measurement, in evaluation mode
    """

    name: str
    model: Mapping[str, Any]
    decoder: Decoder

    @property
    def weights(self) -> int:
        """Bytes of the parameters."""
        return sum(parameter.nbytes for parameter in self.decoder.parameters())

    def build(self, device: torch.device) -> Decoder:
        """The decoder with weights, as they are before a training: the time of a step hardly depends on them."""
        return compose(self.model, device=device).to(self.decoder.output_weight.dtype).eval()


def read_arms(request: Request, dtype: torch.dtype, device: torch.device) -> list[Arm]:
    """Compose every arm, and check it at every precision and length.

    Raises:
        ConfigError: an arm cannot be composed, has no such caches or positions, or does not fit
    """
    arms = []
    for name, overrides in request.arms.items():
        model = read_arm(name, overrides).model
        with named(name):
            arm = Arm(name, model, compose(model, device="meta").to(dtype).eval())
            _check(arm, request, device)
        arms.append(arm)
    return arms


def cells_of(request: Request, context: int) -> list[Cell]:
    """Every arm at every precision, at one length."""
    return [Cell(arm, bits, context) for bits in request.settings.bits for arm in request.arms]


def _check(arm: Arm, request: Request, device: torch.device) -> None:
    settings, most = request.settings, arm.decoder.config["max_positions"]
    needed, available = arm.weights + settings.budget, device_memory(device)
    if needed > available:
        rule = f"with weights of {in_bytes(arm.weights)} is more than {device.type} has ({in_bytes(available)})"
        raise ConfigError("memory", settings.memory, rule, "Lower it, or choose a smaller model")
    if (longest := max(settings.context)) > most:
        rule = f"is longer than the model is made for (model.max_positions = {most})"
        raise ConfigError("context", longest, rule, "Shorten it, or raise model.max_positions")
    for bits in settings.bits:
        _check_sequence(_bytes_of_one(arm, longest, bits), Cell(arm.name, bits, longest), request)


def _check_sequence(one: int, cell: Cell, request: Request) -> None:
    """Refuse a sequence that does not fit, or that takes nothing so that any number would."""
    settings = request.settings
    if one > settings.budget:
        of = f"{cell.context} tokens, {precision(cell.bits)}"
        rule = f"is less than the caches of one sequence take ({in_bytes(one)}: {of})"
        raise ConfigError("memory", settings.memory, rule, f"Write memory={-(-one // 10**6)}MB, or shorten context")
    if not one and settings.rows is None:
        rule = "remembers nothing of a token, so no memory limits how many sequences are decoded at once"
        raise ConfigError("rows", None, rule, "Write the number of sequences: rows=64")


def _bytes_of_one(arm: Arm, context: int, bits: Bits) -> int:
    """Bytes of the caches of one sequence, counted on the meta device."""
    try:
        if not all(isinstance(cache, Cache) for cache in arm.decoder.new_caches(1, context, bits)):
            rule = "has a cache of its own class, whose rows cannot be repeated"
            raise ConfigError("model.attention", "…", rule, "Derive it from Cache of blocks/cache")
        return cache_bytes(arm.decoder, context, arm.decoder.output_weight.dtype, bits)
    except BlockError as error:
        raise ConfigError(error.parameter, error.value, error.rule, error.remedy) from None
    except NotImplementedError:
        rule = "has no new_cache, and decoding needs a cache"
        raise ConfigError("model.attention", "…", rule, "Give the block a new_cache") from None
