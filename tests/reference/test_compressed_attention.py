"""Attention over means of windows against transformers' DeepSeek-V4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding

from blockwright.blocks.forward_pass import Pass

D, N, H, R, L, G, A = 40, 4, 16, 8, 20, 2, 12
INDEX = {"n_heads": 32, "head_dim": 8, "top_k": 2}
KINDS = {
    "sliding_attention": None,
    "heavily_compressed_attention": {"name": "hca", "every": 8},
    "compressed_sparse_attention": {"name": "csa", "every": 4, **INDEX},
}
YARN = {"factor": 16, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}


RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
SIZES = {"hidden_size": D, "num_attention_heads": N, "head_dim": H, "q_lora_rank": L, "o_groups": G, "o_lora_rank": A}
SIZES |= {"index_n_heads": INDEX["n_heads"], "index_head_dim": INDEX["head_dim"], "index_topk": INDEX["top_k"]}
SIZES |= {"sliding_window": 5, "num_hidden_layers": 1, "max_position_embeddings": 512}
OURS: dict[str, Any] = {"name": "shared_kv", "n_heads": N, "head_dim": H, "rope_head_dim": R, "q_lora_rank": L}
OURS |= {"window": 5, "n_groups": G, "o_lora_rank": A, "query_norm": "unit_rms", "scores": "sinks"}
OUR_YARN = {"name": "yarn", "theta": 160000.0, "factor": 16, "original_positions": 32, "mscale": 0.0}


def theirs_of(kind: str) -> tuple[DeepseekV4Attention, Callable[[Tensor, Tensor], Any]]:
    rope = {"partial_rotary_factor": R / H, "rope_parameters": {"rope_type": "yarn", **YARN}}
    config = DeepseekV4Config(**SIZES, **rope, layer_types=[kind], compress_rates=RATES, attn_implementation="eager")
    rotary = DeepseekV4RotaryEmbedding(config)
    attention = DeepseekV4Attention(config, 0).double().eval()
    return attention, lambda x, at: {name: rotary(x, at, layer_type=name) for name in ("main", "compress")}


def node_of(kind: str) -> dict[str, Any]:
    yarn, rope = {**OUR_YARN, "mscale_all_dim": 0.0}, {"name": "rope", "pairing": "interleaved"}
    return {**OURS, "position": rope if KINDS[kind] is None else yarn, "compressor": KINDS[kind]}


def weights_for(ours: Any) -> dict[str, Tensor]:
    """Our weights under their names."""
    own = dict(ours.state_dict())
    names = {
        "q_down": "q_a_proj", "q_norm": "q_a_norm", "q_up": "q_b_proj", "kv_norm": "kv_norm", "kv": "kv_proj",
        "output": "o_b_proj", "compressor.norm": "compressor.kv_norm",
        "compressor.index_norm": "compressor.indexer.kv_norm", "compressor.index.query": "compressor.indexer.q_b_proj",
        "compressor.index.weights": "compressor.indexer.scorer.weights_proj",
    }  # fmt: skip
    found = {f"{their}.weight": own[f"{our}.weight"] for our, their in names.items() if f"{our}.weight" in own}
    for our, their in (("compressor.pool", "compressor"), ("compressor.index_pool", "compressor.indexer")):
        if f"{our}.place" in own:
            found |= {
                f"{their}.kv_proj.weight": own[f"{our}.value.weight"],
                f"{their}.gate_proj.weight": own[f"{our}.gate.weight"],
            }
            found[f"{their}.position_bias"] = own[f"{our}.place"]
    return {**found, "o_a_proj.weight": own["group"].flatten(0, 1), "sinks": own["scores.sinks"]}


@pytest.mark.parametrize("kind", list(KINDS))
def test_is_that_of_deepseek_v4(make_block: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # parts of it compute in single precision whatever the model's
    ours = make_block("attention", node_of(kind), d_model=D)
    theirs, rotary = theirs_of(kind)
    theirs.load_state_dict(weights_for(ours))
    T = 37
    x, at = torch.randn(2, T, D, dtype=torch.float64), torch.arange(T)[None]
    index = torch.arange(T)
    hidden = (index[None] > index[:, None]) | (index[None] <= index[:, None] - 5)
    mask = torch.zeros(2, 1, T, T, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    want = theirs(x, rotary(x, at), at, mask)[0]
    torch.testing.assert_close(ours(x, Pass(at)), want, rtol=0, atol=1e-6)
