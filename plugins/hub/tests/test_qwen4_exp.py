"""Qwen3.8-Flash-Next against transformers' class of it, which no family here reads: its n-grams fill padded tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_models import filled
from torch import Tensor, nn
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import count_parameters
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import show
from blockwright.plugins.hub.families.qwen_hybrid import (
    APART,
    NAMES,
    SHARED,
    THEIRS,
    channels,
    convolved,
    fused,
    gated_queries,
)
from blockwright.plugins.hub.hybrid_like import DELTA
from blockwright.plugins.hub.llama_like import LAYER, ROUTER
from blockwright.plugins.hub.names import TAPS, Form, Row, beside, one_of

M, EPS, END = 4, 0.01, 5
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "hc_count": M,
    "hc_lowrank": 7,
    "ple_layer_ids": [2],
    "ple_embed_dim": 24,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 29,
    "eos_token_id": END,
    "seed": 7,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "rms_norm_eps": EPS,
    "output_gate_type": "sigmoid",
    "max_position_embeddings": 64,
    "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
}
STACKED = (
    Row("layers.{i}.ffn.experts.gate_up", LAYER + "mlp.experts.gate_up_proj"),
    Row("layers.{i}.ffn.experts.down", LAYER + "mlp.experts.down_proj"),
)
NORM = {"name": "rmsnorm1p", "eps": EPS}
OURS: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 48,
    "n_layers": 4,
    "max_positions": 64,
    "attention": {
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "qk_norm": {"q_norm": NORM, "k_norm": NORM},
        "selector": {"n_heads": 16, "head_dim": 16, "top_k": 2, "q_norm": NORM, "k_norm": NORM},
    },
    "ffn": {"n_experts": 6, "shared": {"d_ff": 24}},
    "gating": {"top_k": 2},
    "experts": {"d_ff": 20},
    "residual": {"rank": 7, "attention_norm": NORM, "ffn_norm": NORM, "closing": {"rank": 7, "norm": NORM}},
    "memory": {"rows": 29, "width": 24, "n_heads": 2, "end": END, "seed": 7, "key_norm": NORM, "query_norm": NORM}
    | {"eps": EPS},
    "variants": {
        "attention": {
            "linear": {"n_heads": 4, "n_key_heads": 2, "head_dim": 8, "norm": {"name": "rmsnorm", "eps": EPS}}
        }
    },
}


def streams(ours: str, theirs: str) -> list[Row]:
    """The norms of the streams, and the projections of a gated read."""
    maps = (("down", "input_mix_weight_down"), ("up", "input_mix_weight_up"))
    return [
        *(Row(f"{ours}.norms.{n}.weight", theirs + ".hc_norm.weight", form=one_of(M, n)) for n in range(M)),
        *(Row(f"{ours}.{our}.weight", f"{theirs}.{their}.weight") for our, their in maps),
    ]


def table(decoder: Decoder) -> list[Row]:
    residual, memory, ple = "layers.{i}.residual.", "layers.{i}.memory.", LAYER + "ple."
    indexer = LAYER + "self_attn.indexer."
    selector: Any = show(decoder, "full.attention.selector")
    index = {f"selector.{name}": len(selector.get_submodule(name).weight) for name in ("query", "key")}
    rows: list[Row] = [*NAMES, *ROUTER, *STACKED, *SHARED, *convolved(decoder), *gated_queries(decoder)]
    rows += [*beside(DELTA, fused(channels(decoder), THEIRS + "in_proj_qkv.weight")), *beside(DELTA, APART)]
    for ours, theirs in (("attention", "attn"), ("ffn", "mlp")):
        theirs = f"{LAYER}{theirs}_hyper_connection"
        rows += streams(f"{residual}{ours}_read", theirs)
        rows.append(Row(f"{residual}{ours}_write.weight", theirs + ".block_inject_weight.weight"))
    rows += streams(residual + "closing.read", "model.hyper_connection_mixer")
    rows += fused(index, indexer + "index_qk_proj.weight")
    rows += [Row(f"layers.{{i}}.attention.selector.{n}_norm.weight", f"{indexer}{n}_layernorm.weight") for n in "qk"]
    for ours, theirs in (("key", "norm_key"), ("query", "norm_query")):
        rows += [Row(f"{memory}{ours}_norms.{n}.weight", f"{ple}{theirs}.weight", form=one_of(M, n)) for n in range(M)]
    rows += [Row(f"{memory}{name}.weight", f"{ple}{name}_proj.weight") for name in ("key", "value")]
    size = len(decoder.layers[1].memory.table.weight)  # type: ignore[union-attr, arg-type]
    padded = Form(lambda theirs: theirs[:size], lambda shape: shape)
    rows.append(Row(memory + "table.weight", ple + "ple_embedding.ngram_embedding.weight", form=padded))
    return [*rows, Row(memory + "smooth.weight", ple + "conv1d.weight", form=TAPS)]


@pytest.fixture(scope="module")
def both(randomise: Callable[..., None]) -> tuple[nn.Module, Decoder]:
    config = Qwen4ExpTextConfig(**SMALL)
    config._experts_implementation = "eager"
    theirs = Qwen4ExpForCausalLM(config).eval()
    randomise(theirs)
    decoder = compose(preset("qwen3_8_flash_next", OURS)).eval()
    hashes = {name for name, _ in theirs.named_buffers()}
    (gain,) = filled(decoder, table(decoder), theirs) - hashes  # a factor of the taps here
    assert gain == "model.layers.1.ple.norm_conv.weight"
    with torch.no_grad():
        decoder.state_dict()["layers.1.memory.smooth.weight"].mul_(1 + theirs.get_parameter(gain)[:, None])
    return theirs, decoder


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal_those_of_transformers(both: Any, ids: Tensor) -> None:
    theirs, decoder = both
    expected = theirs(ids).logits
    assert expected.std() > 0.1 and (ids == END).any()
    torch.testing.assert_close(decoder(ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_same_logits(both: Any, ids: Tensor) -> None:
    theirs, decoder = both
    expected, caches = theirs(ids).logits, decoder.new_caches(2, 33)
    parts = [decoder(ids[:, a:b], caches=caches) for a, b in ((0, 9), (9, 10), *((t, t + 1) for t in range(10, 33)))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_preset_has_as_many_parameters_as_their_class() -> None:
    """But for the rows that pad the tables to a multiple of 128, and the gain of a norm, a factor of the taps here."""
    sizes = {"vocab_size": 248320, "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24}
    sizes |= {"linear_num_value_heads": 48, "moe_intermediate_size": 640, "shared_expert_intermediate_size": 640}
    sizes |= {"num_experts": 512, "num_experts_per_tok": 10, "ple_layer_ids": [2], "ple_embed_dim": 2560}
    sizes |= {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048}
    with torch.device("meta"):
        theirs = Qwen4ExpForCausalLM(
            Qwen4ExpTextConfig(**sizes, indexer_compress_ratio=4, eos_token_id=248044, rope_parameters=ROPE)
        )
    ours = compose(preset("qwen3_8_flash_next"), device="meta")
    rows = len(ours.layers[1].memory.table.weight)  # type: ignore[union-attr, arg-type]
    total = sum(p.numel() for p in theirs.parameters())
    assert count_parameters(ours).total == total - (320_001_536 - rows) * 160 - M * 2560 == 176_943_874_880
