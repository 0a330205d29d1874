"""DeepSeek-V3's FP8 weights: float8_e4m3fn with one scale per block of 128 × 128."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interop.config import refusal
from interop.shards import Shards
from registry import ConfigError

SUFFIX = "_scale_inv"


def block_size(values: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, from config.json.

    Raises:
        ConfigError: another kind of quantisation
    """
    quantisation = values.get("quantization_config") or {}
    method = quantisation.get("quant_method", "fp8") if isinstance(quantisation, dict) else quantisation
    if method != "fp8":
        rule = "is a quantisation that is not supported"
        raise refusal("quantization_config.quant_method", method, rule, "Use a bf16 checkpoint, or FP8 blocks")
    size = quantisation.get("weight_block_size") or [128, 128]
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise refusal("quantization_config.weight_block_size", size, "must be two numbers", "Write [128, 128]")
    return size[0], size[1]


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Weight [R,C] in FP8 and scale [⌈R/rows⌉,⌈C/columns⌉] → weight · scale of its block, [R,C] fp32."""
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def scale_of(shards: Shards, name: str, block: tuple[int, int]) -> Tensor:
    """The scales of an FP8 weight.

    Raises:
        ConfigError: they are missing or have the wrong shape
    """
    entry, scale = shards.entries[name], shards.entries.get(name + SUFFIX)
    where = str(shards.folder / entry.file)
    if scale is None:
        raise ConfigError(where, name, f"is stored in FP8, and {name}{SUFFIX} is missing", "Fetch the checkpoint again")
    need = tuple(-(-n // size) for n, size in zip(entry.shape, block, strict=False))
    if scale.shape != need or len(entry.shape) != 2:
        rule = f"must have shape {need}: one scale per block of {block[0]} × {block[1]} of {name} {entry.shape}"
        raise ConfigError(str(shards.folder / scale.file), scale.shape, rule, "Fetch the checkpoint again")
    return shards.one(name + SUFFIX)


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype needs scales."""
    return dtype == torch.float8_e4m3fn
