"""The data that a block declares about itself match the block, for every registered block."""

from __future__ import annotations

from typing import Any

from blockwright import registry
from blockwright.blocks.base import Block
from tests.blocks.small import Make

CONTEXT = {"width": 48, "side": 4, "tile": 16, "dim": 48, "head_dim": 12, "n_heads": 4, "n_experts": 8, "top_k": 2}
CONTEXT |= {"n_kv_heads": 2, "vocab_size": 61, "n_streams": 3, "visits": 3, "latent_dim": 48, "attention_heads": 4}
CONTEXT |= {"kv_dim": 12, "rope_dim": 6}
SMALL = {"tile": 16, "patch": 4, "width": 48, "depth": 1}
AROUND: dict[str, Any] = {"gating": "softmax_topk", "experts": {"name": "swiglu", "d_ff": 12}, "ffn": "swiglu"}
AROUND |= {"residual": "prenorm"}  # in another residual block
AROUND |= {"vision": {"name": "siglip", **SMALL}, "projector": "downsample_mlp", "tiling": "grid_2d"}
VALUES = {"d_ff": 12, "image_token": 60, "rows": 97}  # of required parameters
WIDER = {"bias": True, "q_lora_rank": 13, "shared": "swiglu"}  # options that bring more parameters


def nodes(kind: str, name: str) -> list[dict[str, Any]]:
    parameters = registry.lookup(kind, name).schema.parameters
    needed = {k: VALUES[k] for k, p in parameters.items() if p.required and not p.child}
    needed |= {k: v for k, v in SMALL.items() if k in parameters}
    return [{"name": name, **needed}, {"name": name, **needed, **{k: v for k, v in WIDER.items() if k in parameters}}]


def test_what_writes_into_the_stream_says_so_by_matrices_of_the_models_width(make_block: Make) -> None:
    wrong = []
    for kind in registry.kinds():
        for name in registry.names(kind):
            # A selector is an option of others, and needed by the one that shares it.
            around = {**AROUND, "selector": "block"} if name == "shared" else AROUND
            for node in nodes(kind, name):
                block = make_block(kind, node, around=around, **CONTEXT)
                parameters = dict(block.named_parameters())
                wrong += [(kind, name, out) for out in block.residual_outputs if parameters[out].shape[-2] != 48]
                writes = any(m.residual_outputs for m in block.modules() if isinstance(m, Block))
                if kind in ("attention", "ffn", "experts") and not writes and not getattr(block, "empty", False):
                    wrong.append((kind, name, "says nothing"))
    assert not wrong
