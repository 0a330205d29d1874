"""``trainer.compile=true``: each layer's forward compiled by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch

from blocks.decoder import Decoder, Layer
from registry import ConfigError


def check_compiler(accelerator: str) -> None:
    """Refuse to compile for a CPU where nothing compiles C++; a GPU's kernels are Triton's.

    Raises:
        ConfigError
    """
    known = ("g++", "clang++", "c++")
    if accelerator == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", *known))):
        rule = f"needs a C++ compiler, and none of {', '.join(known)} is found"
        raise ConfigError("trainer.compile", True, rule, "Install one, or write trainer.compile=false")


def compile_layers(decoder: Decoder, *, backend: str = "inductor", fullgraph: bool = False) -> None:
    """Put ``torch.compile`` around the forward of every layer, those of multi-token prediction included.

    Layers, and not the decoder: layers that are alike share one graph, so that deep models compile no longer than
    shallow ones, and what a strategy hooks onto a layer (sharding, recomputation) stays outside of the graph. The
    layer's parameters keep their names. Shapes are taken as constants: training has few.

    Args:
        backend: of torch.compile
        fullgraph: raise where the graph would break
    """
    layers = list(_layers(decoder))
    import torch._dynamo.config as dynamo  # two seconds to import, for those who compile

    # One graph for each kind of layer, with and without gradients, for training's shape and validation's.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend, fullgraph=fullgraph)  # type: ignore[method-assign]


def run_as_written(decoder: Decoder) -> None:
    """Undo ``compile_layers``: generation, whose shapes change with every token, would compile without end."""
    for layer in _layers(decoder):
        vars(layer).pop("forward", None)


def _layers(decoder: Decoder) -> Iterator[Layer]:
    yield from decoder.layers  # type: ignore[misc]
    yield from (depth.layer for depth in decoder.mtp)  # type: ignore[misc]
