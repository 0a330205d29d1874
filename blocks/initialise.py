"""The rule by which a decoder's weights start, the same at any world size and for any neighbour.

Tensors of two dimensions and more ~ N(0, std²): matrices, embeddings, expert stacks (DeepSeek's papers: std 0.006;
the released Hugging Face configurations say 0.02). With ``depth_scaled``, those that write into the residual stream
get std/√(2·n_layers), as in GPT-2. One-dimensional tensors: biases 0, all others (gains) 1. Buffers: 0. Then
``Block.reset_parameters`` may set what the rule does not suit.

Every tensor is drawn from a generator of its own, seeded by the run's seed and the tensor's name. Swapping one block
therefore leaves every other weight as it was, to the bit: an ablation compares blocks, not draws.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from blocks.base import Block


@torch.no_grad()
def initialise(model: nn.Module, *, std: float, depth_scaled: bool, n_layers: int, seed: int, prefix: str = "") -> None:
    """Fill every parameter and buffer of ``model`` by the rule.

    Args:
        model: a materialised module
        std: standard deviation of the normal draws
        depth_scaled: whether what writes into the residual stream starts smaller, by 1/√(2·n_layers)
        n_layers: depth of the decoder
        seed: of the run
        prefix: what stands before the names of ``model`` where it is a part of a decoder: ``layers.3.``
    """
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, Block)]
    outputs = {f"{name}.{output}".lstrip(".") for name, block in blocks for output in block.residual_outputs}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            shrink = math.sqrt(2 * n_layers) if depth_scaled and name in outputs else 1.0
            _draw(parameter, std / shrink, stable_seed(seed, prefix + name))
    for buffer in model.buffers():
        buffer.zero_()
    for name, block in blocks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(seed, (prefix + name).rstrip(".")))
            block.reset_parameters()


def stable_seed(seed: int, name: str) -> int:
    """A seed for ``name``, the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")


def _draw(parameter: Tensor, std: float, seed: int) -> None:
    """Drawn on the CPU in fp32, so that every device and precision starts from the same numbers."""
    in_place = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    drawn = parameter if in_place else torch.empty(parameter.shape, dtype=torch.float32)
    drawn.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
    if not in_place:
        parameter.copy_(drawn)
