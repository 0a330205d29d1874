"""``trainer.compile``: compile each layer's forward separately, on a GPU where that pays.

A small model's GPU waits: the host asks for some hundred operators a layer, one by one, and each takes less time than
asking. A compiled layer asks for far fewer. Operators are counted (benchmarks/results/absent_gpu.md), seconds are
estimates: this project has not run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from blockwright.blocks.cost import training_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.layer import Layer

OPERATORS = 150  # of a layer's training step that a compiled one has not: 118 to 172 of five presets, but 9 of GPT-2's
LAUNCH_S = 7e-6  # of an operator that the host asks for
REACHED = 0.4  # of the peak, by products that are large enough
PEAK = {8: 3.1e14, 9: 9.9e14}  # products in bf16 a second, A100 and H100, by major compute capability
COMPILING_S = 90.0  # of all kinds of layer, with gradients and without


class Compiling:
    """Compiles a decoder's layers while it is trained.

    Args:
        decoder: whose layers
        chosen: whether; ``auto``: on one GPU, or on several that hold the whole model each, if they would otherwise
            wait longer than compiling takes. Decided by shapes, not by timing, so that runs repeat exactly, and held by
            checkpoints, so that a resumed run computes as before
    """

    def __init__(self, decoder: Decoder, chosen: bool | str) -> None:
        self.decoder, self.chosen = decoder, chosen
        if chosen is True:
            compile_layers(decoder)

    def decide(self, trainer: L.Trainer, shape: torch.Size, device: torch.device) -> bool:
        """Choose for ``auto``, by the shape of the first micro-batch, [B,T]; returns whether layers are compiled."""
        if self.chosen != "auto":
            return bool(self.chosen)
        self.chosen = False
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if whole and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            waited = seconds_waited(self.decoder, shape[:2].numel(), shape[1], capability)
            steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
            self.chosen = waited * steps > COMPILING_S
        if self.chosen:
            rank_zero_info("layers are compiled: in so small a model a GPU waits for the host. trainer.compile=false")
            compile_layers(self.decoder)
        return self.chosen

    def end(self) -> None:
        """Undo it: generation, whose shapes change with every token, would compile each time."""
        if self.chosen is True:
            for layer in _layers(self.decoder):
                vars(layer).pop("forward", None)


def seconds_waited(decoder: Decoder, tokens: int, length: int, capability: tuple[int, int]) -> float:
    """Seconds of a micro-batch in which a GPU waits to be asked, and would not if layers were compiled.

    Args:
        tokens: of the micro-batch
        length: of its rows
        capability: of the GPU; one that is not known counts as an H100
    """
    asking = OPERATORS * LAUNCH_S * len(list(_layers(decoder)))
    computing = tokens * training_flops_per_token(decoder, length) / (REACHED * PEAK.get(capability[0], PEAK[9]))
    return max(0.0, asking - computing)


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


def _layers(decoder: Decoder) -> Iterator[Layer]:
    yield from decoder.layers  # type: ignore[misc]
    yield from (depth.layer for depth in decoder.mtp)  # type: ignore[misc]
