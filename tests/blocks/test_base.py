"""The data that a block declares about itself match the block, for every registered block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from blockwright import registry
from blockwright.blocks.base import Block, Placement

CONTEXT = {
    "width": 48,
    "side": 4,
    "tile": 16,
    "dim": 48,
    "head_dim": 12,
    "n_heads": 4,
    "n_experts": 8,
    "top_k": 2,
    "n_kv_heads": 2,
    "vocab_size": 61,
    "n_streams": 3,
    "visits": 3,
    "latent_dim": 48,
    "attention_heads": 4,
    "kv_dim": 12,
    "rope_dim": 6,
}
SMALL = {"tile": 16, "patch": 4, "width": 48, "depth": 1}
AROUND: dict[str, Any] = {"gating": "softmax_topk", "experts": {"name": "swiglu", "d_ff": 12}, "ffn": "swiglu"}
AROUND |= {"residual": "prenorm"}  # in another residual block
AROUND |= {"vision": {"name": "siglip", **SMALL}, "projector": "downsample_mlp", "tiling": "grid_2d"}
VALUES = {"d_ff": 12, "image_token": 60, "rows": 97}  # of required parameters
WIDER = {"bias": True, "q_lora_rank": 13, "shared": "swiglu"}  # options that bring more parameters
EVERY = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


def nodes(kind: str, name: str) -> list[dict[str, Any]]:
    parameters = registry.lookup(kind, name).schema.parameters
    needed = {k: VALUES[k] for k, p in parameters.items() if p.required and not p.child}
    needed |= {k: v for k, v in SMALL.items() if k in parameters}
    return [{"name": name, **needed}, {"name": name, **needed, **{k: v for k, v in WIDER.items() if k in parameters}}]


def around(name: str) -> dict[str, Any]:
    """The children that a block takes; a selector is an option of others, and needed by the one that shares it."""
    return {**AROUND, "selector": "block"} if name == "shared" else AROUND


@pytest.fixture(scope="module")
def blocks_of(make_block: Callable[..., Any]) -> Callable[[str, str], list[Block]]:
    return lambda kind, name: [make_block(kind, node, around=around(name), **CONTEXT) for node in nodes(kind, name)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_plan_splits_parameters_that_are_there(blocks_of: Callable[..., list[Block]], kind: str, name: str) -> None:
    for block in blocks_of(kind, name):
        parameters = dict(block.named_parameters())
        for parameter, placement in block.parallel_plan().items():
            assert placement in get_args(Placement)
            needs = {"column": 1, "row": 2, "expert": 2, "replicate": 0}[placement]
            assert parameters[parameter].ndim >= needs, parameter


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_residual_outputs_are_matrices_that_write_the_models_width(
    blocks_of: Callable[..., list[Block]], kind: str, name: str
) -> None:
    for block in blocks_of(kind, name):
        parameters = dict(block.named_parameters())
        for output in block.residual_outputs:
            assert parameters[output].shape[-2] == 48


@pytest.mark.parametrize("kind", ["attention", "ffn", "experts"])
def test_whatever_writes_into_the_stream_says_so(blocks_of: Callable[..., list[Block]], kind: str) -> None:
    for name in registry.names(kind):
        for block in blocks_of(kind, name):
            writes = any(m.residual_outputs for m in block.modules() if isinstance(m, Block))
            assert writes or getattr(block, "empty", False), name


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_block_built_on_the_meta_device_has_the_same_parameters(
    blocks_of: Callable[..., list[Block]], make_block: Callable[..., Any], kind: str, name: str
) -> None:
    for node, real in zip(nodes(kind, name), blocks_of(kind, name), strict=True):
        with torch.device("meta"):
            ghost = registry.build(
                kind,
                registry.Node(node, "model"),
                registry.Scope(
                    {
                        k: registry.Node(v, k)
                        for k, v in {**around(name), "norm": "rmsnorm", "position": "none"}.items()
                    },
                    {"d_model": 48, "n_layers": 2, "layer_idx": 0, "max_positions": 64, **CONTEXT},
                ),
            )
        assert {n: p.shape for n, p in ghost.state_dict().items()} == {n: p.shape for n, p in real.state_dict().items()}
        assert all(p.is_meta for p in ghost.state_dict().values())
