"""What the planner predicts: of an arm on this machine, and of the paper's two models on eight H800.

The only module that imports the planner, which is declared in pyproject.toml.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.equal_memory.race import Peaks
from blockwright.plugins.equal_memory.request import Bits
from blockwright.plugins.planner.generation import Generation, bytes_of_one, generation
from blockwright.plugins.planner.hardware import Coefficients, Hardware, coefficients, hardware

REACHED = Coefficients(**{field.name: 1.0 for field in fields(Coefficients)})  # rates are measured, not peaks
GPU, GPUS, CONTEXT = "h800", 8, 4096  # of the paper's node, and tokens in each cache


@dataclass(frozen=True)
class Claim:
    """How a model does against another.

    Args:
        name: of the comparison
        rows: sequences at once against the other's, at equal memory; None if unknown
        speed: tokens a second against the other's
        saved: share of the bytes of the other's cache that it does without; None if unknown
    """

    name: str
    rows: float | None
    speed: float
    saved: float | None


PAPER = Claim("DeepSeek-V2 against DeepSeek 67B, arXiv 2405.04434", None, 5.76, 0.933)


def fitting(decoder: Decoder, budget: int, context: int, bits: Bits, most: int | None) -> int:
    """Sequences that the planner expects to fit.

    Args:
        decoder: on the meta device
        budget: bytes of all caches
        context: tokens in each
        bits: of their numbers; None for those of the weights
        most: sequences at most; needed where a sequence takes nothing
    """
    width = _width(decoder)
    one = bytes_of_one(decoder, context, width, bits or width)
    limits = [budget / one] if one else []
    return int(min(limits if most is None else [*limits, most]))


def planned(decoder: Decoder, peaks: Peaks, rows: int, context: int, bits: Bits) -> Generation:
    """The planner's step of a batch, on a machine of these rates; arguments as of ``fitting``."""
    width = _width(decoder)
    own = Hardware(
        "this machine", peaks.flops, peaks.flops, math.inf, peaks.read, math.inf, math.inf, 1, 0.0, card="none"
    )
    at: dict[str, Any] = {"weight_bits": width, "cache_bits": bits or width, "context": context}
    return generation(decoder, own, REACHED, gpus=1, batch=rows, **at)


def _width(decoder: Decoder) -> int:
    """Bits of a weight."""
    return 8 * decoder.output_weight.dtype.itemsize


def paper() -> list[Claim]:
    """The paper's claim, and the planner's of that node: both changes, the architecture alone, the bits alone."""
    models = {name: compose(preset(name), device="meta") for name in ("deepseek_v2", "deepseek_67b")}

    def plan(name: str, weight_bits: int, cache_bits: int) -> Generation:
        at: dict[str, Any] = {"weight_bits": weight_bits, "cache_bits": cache_bits, "context": CONTEXT}
        return generation(models[name], hardware(GPU), coefficients(), gpus=GPUS, **at)

    quantised, exact, dense = plan("deepseek_v2", 8, 6), plan("deepseek_v2", 16, 16), plan("deepseek_67b", 16, 16)
    node = f"planned for {GPUS} {GPU.upper()}, {CONTEXT:,} tokens"
    return [
        PAPER,
        _claim(f"{node}: V2 with 8-bit weights and 6-bit caches against 67B", quantised, dense),
        _claim(f"{node}: V2 against 67B, both in 16 bits", exact, dense),
        _claim(f"{node}: V2 with 8-bit weights and 6-bit caches against 16 bits", quantised, exact),
    ]


def _claim(name: str, one: Generation, other: Generation) -> Claim:
    bytes_of = [each.caches / each.batch for each in (one, other)]
    speed = one.tokens_per_second / other.tokens_per_second
    return Claim(name, one.batch / other.batch, speed, 1 - bytes_of[0] / bytes_of[1])
