"""litgpt, configured by its own ``Config``.

It does not support uncompressed queries with latent attention: its query latent is as wide as makes the parameter
counts equal. Its sigmoid gate needs groups: two, both kept, which is no restriction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.base import Model, random_like
from benchmarks.race import Contender
from benchmarks.shapes import Shape


def configuration(shape: Shape, contender: Contender) -> Any:
    """litgpt's configuration of a model of these sizes."""
    from litgpt.config import Config

    common: dict[str, Any] = {
        "name": contender.model,
        "block_size": 32768,
        "n_layer": shape.n_layers,
        "n_embd": shape.d_model,
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": shape.vocab_size,
        "n_head": shape.n_heads,
        "norm_class_name": "RMSNorm",
        "norm_eps": 1e-6,
        "parallel_residual": False,
        "bias": False,
        "rotary_percentage": 1.0,
    }
    if contender.family == "dense":
        return Config(**common, mlp_class_name="LLaMAMLP", intermediate_size=shape.dense_width)
    if contender.family == "mixtral":
        sizes = {"intermediate_size": shape.mixtral_width, "moe_intermediate_size": shape.mixtral_width}
        experts = {"mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 2}
        return Config(**common, **experts, **sizes, n_query_groups=shape.kv_heads)
    latent = {
        "q_lora_rank": query_latent(shape),
        "kv_lora_rank": shape.latent,
        "qk_rope_head_dim": shape.rope,
        "qk_nope_head_dim": shape.nope,
        "v_head_dim": shape.value,
    }
    experts = {
        "mlp_class_name": "LLaMAMoE",
        "n_expert": shape.n_experts,
        "n_shared_expert": shape.n_shared,
        "n_expert_per_token": shape.top_k,
        "norm_topk_prob": True,
        "n_expert_groups": 2,
        "n_topk_groups": 2,
        "n_topk_scores_per_group": 2,
    }
    widths = {"intermediate_size": shape.expert_width, "moe_intermediate_size": shape.expert_width}
    return Config(**common, **experts, **widths, latent_attention=latent, rope_interleave=True)


def query_latent(shape: Shape) -> int:
    """Width of a query latent with as many parameters as a direct projection from d_model, a multiple of 8."""
    queries = shape.n_heads * (shape.nope + shape.rope)
    return 8 * math.floor(shape.d_model * queries / (shape.d_model + queries) / 8 + 0.5)


class LitGPT(Model):
    """litgpt's GPT."""

    def __init__(self, shape: Shape, contender: Contender) -> None:
        from litgpt.model import GPT

        self.module = self.gpt = GPT(configuration(shape, contender))
        self.gpt.apply(self.gpt._init_weights)
        self.gpt.max_seq_length = shape.sequence

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        return chunked_cross_entropy(self.gpt(tokens), targets, chunk_size=0)

    def begin(self, batch: int, length: int) -> None:
        weight = self.gpt.lm_head.weight
        self.gpt.clear_kv_cache()
        self.gpt.max_seq_length, self.length = length, 0
        self.gpt.set_kv_cache(batch, length, device=weight.device, dtype=weight.dtype)

    def prefill(self, tokens: Tensor) -> Tensor:
        start, self.length = self.length, self.length + tokens.shape[1]
        positions = torch.arange(start, self.length, device=tokens.device)
        return self.gpt(tokens, input_pos=positions, input_pos_maxp1=self.length)[:, -1]

    def fill(self, context: int) -> None:
        self.length = context
        for block in self.gpt.transformer.h:
            for kept in (block.attn.kv_cache.k, block.attn.kv_cache.v):
                kept.copy_(random_like(tuple(kept.shape), kept))

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens)

    def cache_bytes(self) -> int:
        caches = [block.attn.kv_cache for block in self.gpt.transformer.h]
        return sum(c.k.nbytes + c.v.nbytes for c in caches)
