"""Quantised checkpoints, read as plain ones: a tensor and its scales become the weight that they stand for.

===========  ====================================  ================================================  =================
of           numbers                               scales                                            unpacks to
===========  ====================================  ================================================  =================
DeepSeek-V3  ``X`` [R,C] float8_e4m3               ``X_scale_inv`` [⌈R/128⌉,⌈C/128⌉], a block each   ``X`` [R,C] fp32
DeepSeek-V4  ``X`` [R,C/2] int8, two fp4 a byte    ``X`` with ``scale`` for ``weight`` [R,C/32]      ``X`` [R,C] bf16
gpt-oss      ``X_blocks`` [E,R,C/32,16], the same  ``X_scales`` [E,R,C/32] uint8                     ``X`` [E,C,R] bf16
===========  ====================================  ================================================  =================

An fp4 number is e2m1 (OCP Microscaling Formats 1.0): sign, two bits of exponent, one of fraction; its byte holds the
even column in the low half. A scale of 32 numbers is e8m0, 2^(byte − 127), so bf16 holds every product exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.checkpoint.shards import Entry, Shards, all_finite
from blockwright.plugins.hub.config import refusal
from blockwright.registry import ConfigError

GROUP = 32  # fp4 numbers that share a scale
BLOCKS, SCALES = "_blocks", "_scales"
AGAIN = "Fetch the checkpoint again"

_SIGNED = torch.tensor(
    [sign * v for sign in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], dtype=torch.float32
)
_BYTE = torch.arange(256)
PAIRS = _SIGNED[torch.stack((_BYTE & 15, _BYTE >> 4), -1)].bfloat16()  # byte → its two numbers


@dataclass(frozen=True)
class Packed:
    """A weight that is stored as two tensors: their names, its shape, and how it is made of them."""

    numbers: str
    scales: str
    shape: tuple[int, ...]
    unpack: Callable[[Tensor, Tensor], Tensor]


class Unpacked:
    """The weights of a checkpoint by the names, shapes and dtypes that they unpack to; read like ``Shards``.

    Args:
        shards: the files
        block: rows and columns of an FP8 block, see ``block_size``

    Raises:
        ConfigError: scales that are missing, or of the wrong shape or dtype
    """

    def __init__(self, shards: Shards, block: tuple[int, int]) -> None:
        self.folder, self._shards = shards.folder, shards
        self.entries = dict(shards.entries)
        self._packed: dict[str, Packed] = {}
        for name, entry in shards.entries.items():
            if (packed := _packed(shards, name, entry, block)) is None:
                continue
            plain = name.removesuffix(BLOCKS) if entry.dtype == torch.uint8 else name
            self._packed[plain] = packed
            if plain != name and plain in shards.entries:
                where = str(self.folder / entry.file)
                raise ConfigError(where, name, f"is there beside {plain}, which it unpacks to", AGAIN)
            for stored in (packed.numbers, packed.scales):
                self.entries.pop(stored, None)
            self.entries[plain] = replace(entry, shape=packed.shape, dtype=torch.bfloat16)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the weights of these names, shard by shard, one in memory at a time.

        Raises:
            ConfigError: one contains NaN or infinity
        """
        wanted = {self._packed[name].numbers if name in self._packed else name: name for name in names}
        for stored, tensor in self._shards.read(wanted):
            name = wanted[stored]
            yield name, self._unpack(name, tensor) if name in self._packed else tensor

    def _unpack(self, name: str, numbers: Tensor) -> Tensor:
        packed = self._packed[name]
        scales = self._shards.one(packed.scales)
        scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
        made = packed.unpack(numbers, scales.float())
        if not all_finite(made):
            where = str(self.folder / self._shards.entries[packed.scales].file)
            raise ConfigError(where, packed.scales, "makes values that are not finite", "Fetch it again; it is damaged")
        return made


def _packed(shards: Shards, name: str, entry: Entry, block: tuple[int, int]) -> Packed | None:
    """How this tensor is packed; None if it is plain, or the scales of another."""
    *lead, last = entry.shape or (0,)
    if entry.dtype == torch.float8_e4m3fn:
        need = tuple(-(-n // size) for n, size in zip(entry.shape, block, strict=False))
        scales = _scales(shards, name, _beside(shards, name), need, len(entry.shape) == 2)
        return Packed(name, scales, entry.shape, lambda numbers, scale: unpack_fp8(numbers, scale, block))
    if entry.dtype == torch.int8:
        need = (*lead, 2 * last // GROUP)
        scales = _scales(shards, name, _beside(shards, name), need, 2 * last % GROUP == 0 and len(lead) == 1)
        return Packed(name, scales, (*lead, 2 * last), unpack_rows)
    if entry.dtype == torch.uint8 and name.endswith(BLOCKS):
        fits = len(lead) == 3 and 2 * last == GROUP
        scales = _scales(shards, name, name.removesuffix(BLOCKS) + SCALES, tuple(lead), fits)
        return Packed(name, scales, (lead[0], lead[2] * GROUP, lead[1]), unpack_experts)
    return None


def _beside(shards: Shards, name: str) -> str:
    """The name of the scales of a weight: ``weight_scale_inv``, or ``scale`` as DeepSeek-V4 has it."""
    short = name.removesuffix("weight") + "scale"
    return short if short in shards.entries else name + "_scale_inv"


def _scales(shards: Shards, name: str, scales: str, need: tuple[int, ...], fits: bool) -> str:
    entry, found = shards.entries[name], shards.entries.get(scales)
    if found is None:
        where = str(shards.folder / entry.file)
        raise ConfigError(where, name, f"is packed, and its scales {scales} are missing", AGAIN)
    if found.shape != need or not fits:
        rule = f"must have shape {need}, as the scales of {name} {entry.shape}"
        raise ConfigError(f"{shards.folder / found.file}: {scales}", found.shape, rule, AGAIN)
    if not found.dtype.is_floating_point and found.dtype != torch.uint8:
        rule = "is not a dtype of scales: F8_E8M0, U8 of the same bits, or floats"
        raise ConfigError(f"{shards.folder / found.file}: {scales}", found.dtype, rule, AGAIN)
    return scales


def block_size(values: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an FP8 block, from config.json.

    Raises:
        ConfigError: another kind of quantisation
    """
    quantisation = values.get("quantization_config") or {"quant_method": "fp8"}
    if not isinstance(quantisation, dict):
        rule = "must be a mapping with quant_method"
        raise refusal("quantization_config", quantisation, rule, "Fetch config.json again")
    method = quantisation.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        rule = "is a quantisation that is not supported"
        raise refusal("quantization_config.quant_method", method, rule, "Use a checkpoint in bf16, fp8 or mxfp4")
    size = quantisation.get("weight_block_size") or [128, 128]
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise refusal("quantization_config.weight_block_size", size, "must be two numbers", "Write [128, 128]")
    return size[0], size[1]


def unpack_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Weight [R,C] and scale [⌈R/rows⌉,⌈C/columns⌉] → weight · scale of its block, [R,C] fp32."""
    rows, columns = weight.shape
    high, wide = min(block[0], rows), min(block[1], columns)  # a block may be larger than the weight
    spread = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return weight.float() * spread


def unpack_rows(packed: Tensor, scale: Tensor) -> Tensor:
    """Bytes [R,C/2] and scales [R,C/32] → [R,C] bf16."""
    pairs = PAIRS[packed.view(torch.uint8).int()]  # [R,C/2,2]
    return (pairs.reshape(*scale.shape, GROUP) * scale.bfloat16()[..., None]).flatten(-2)


def unpack_experts(blocks: Tensor, scale: Tensor) -> Tensor:
    """Bytes [E,R,C/32,16] and scales [E,R,C/32] → [E,C,R] bf16, one expert at a time."""
    experts, rows, groups = scale.shape
    made = torch.empty(experts, groups * GROUP, rows, dtype=torch.bfloat16)
    for e in range(experts):
        made[e] = unpack_rows(blocks[e].flatten(-2), scale[e]).mT
    return made
