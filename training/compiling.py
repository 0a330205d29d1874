"""``trainer.compile=true``: compile each layer's forward separately."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import Layer
from blockwright.registry import ConfigError


def check_compiler(accelerator: str) -> None:
    """Refuse to compile for a CPU without a C++ compiler; a GPU's kernels are Triton's.

    Raises:
        ConfigError
    """
    known = ("g++", "clang++", "c++")
    if accelerator == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", *known))):
        rule = f"needs a C++ compiler, and none of {', '.join(known)} is found"
        raise ConfigError("trainer.compile", True, rule, "Install one, or write trainer.compile=false")


def compile_layers(decoder: Decoder, *, backend: str = "inductor", fullgraph: bool = False) -> None:
    """Apply ``torch.compile`` to the forward of every layer, multi-token prediction included.

    Layers, not the decoder: equal layers share one graph, so that deep models compile no longer than shallow ones, and
    a strategy's hooks on a layer (sharding, recomputation) stay outside the graph. Parameter names do not change.
    Shapes are constants until one changes: what varies then gets one more graph, which takes any.

    Args:
        backend: of torch.compile
        fullgraph: raise where the graph would break
    """
    layers = list(_layers(decoder))
    import torch._dynamo.config as dynamo  # imported here: takes two seconds

    # One graph per kind of layer, with and without gradients, for the shapes of training and validation.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=fullgraph)  # type: ignore[method-assign]


def run_as_written(decoder: Decoder) -> None:
    """Undo ``compile_layers``: generation, whose shapes change with every token, would recompile each time."""
    for layer in _layers(decoder):
        vars(layer).pop("forward", None)


def _layers(decoder: Decoder) -> Iterator[Layer]:
    yield from decoder.layers  # type: ignore[misc]
    yield from (depth.layer for depth in decoder.mtp)  # type: ignore[misc]
