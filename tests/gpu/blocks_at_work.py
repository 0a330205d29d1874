"""One block or layer of DeepSeek-V2-Lite's widths, to be timed: forward and backward in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import SHAPES, Family, composition
from blockwright.blocks.compose import assemble, check
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.training.compiling import compile_layers

PARTS: dict[str, tuple[Family, str]] = {
    "MLA": ("mla_moe", "attention"),
    "MoE": ("mla_moe", "ffn"),
    "dense": ("dense", "ffn"),
    "layer of MLA and MoE": ("mla_moe", "layer"),
}


class Work(NamedTuple):
    """step: one forward and backward; flops: of it, half of the scores; tokens: in it."""

    step: Callable[[], None]
    flops: float
    tokens: int


def work(part: str, small: bool, device: str, compiled: bool, batch: int = 1) -> Work:
    """A step of a part."""
    length = SHAPES["smoke" if small else "lite"].sequence
    decoder = _decoder(part, small, device)
    if compiled:
        if PARTS[part][1] == "layer":
            compile_layers(decoder)
        else:
            getattr(decoder.layers[0], PARTS[part][1]).compile(dynamic=False)
    x = torch.randn(batch, length, decoder.config["d_model"], device=device, dtype=torch.bfloat16).requires_grad_()
    call, given = _call(decoder, part), _given(batch, length, device)
    grad = torch.randn_like(x)

    def step() -> None:
        call(x, *given).backward(grad)
        x.grad = None
        for p in decoder.parameters():
            p.grad = None

    whole, alone = _flops(part, small, length), length * _flops(part, small, 1)
    return Work(step, 3 * batch * (whole + alone) / 2, batch * length)


def _decoder(part: str, small: bool, device: str) -> Decoder:
    """Of one layer; its embedding is of no use, and small. Made where it runs, as tensors without memory have to be."""
    shape = SHAPES["smoke" if small else "lite"]
    model = check({**composition(shape, PARTS[part][0]), "n_layers": 1, "vocab_size": 128})
    with torch.device(device):
        decoder = assemble(model)
    for p in decoder.parameters():
        p.data = torch.empty_like(p, dtype=torch.bfloat16)  # .to() would swap them, which a fake parameter refuses
        nn.init.normal_(p, std=0.02)
    return decoder.choose_kernels()


def _given(batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    return tokens, torch.arange(length, device=device).expand(batch, -1)


def _call(decoder: Decoder, part: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    layer: Any = decoder.layers[0]
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "attention": lambda x, tokens, positions: layer.attention(x, Pass(positions)),
        "ffn": lambda x, tokens, positions: layer.ffn(x, Pass(positions, tokens=tokens))[0],
        "layer": lambda x, tokens, positions: layer(x, Pass(positions, tokens=tokens))[0],
    }
    return calls[PARTS[part][1]]


def _flops(part: str, small: bool, length: int) -> int:
    """Of a forward pass of one row, counted on the meta device; all scores, and no values padded to the keys' width."""
    decoder = _decoder(part, small, "meta").choose_kernels({"attention": "reference"})
    x = torch.zeros(1, length, decoder.config["d_model"], device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _call(decoder, part)(x, *_given(1, length, "meta"))
    return counter.get_total_flops()
