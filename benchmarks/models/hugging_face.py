"""transformers, with the configuration that our export writes for the same composition.

Best settings: SDPA attention, also the default, and the fastest experts' implementation here: ``grouped_mm``, the
default, or the eager loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models.base import Model, random_like
from benchmarks.race import Contender
from benchmarks.shapes import Shape, composition
from blockwright.blocks.compose import compose
from blockwright.plugins.hub.exporting import recognise

TYPES = {"DeepSeek-V3": "deepseek_v3", "Llama": "llama", "Mixtral": "mixtral"}


def configuration(shape: Shape, contender: Contender) -> Any:
    """transformers' configuration of a model of these sizes."""
    from transformers import AutoConfig

    model = composition(shape, contender.family)
    if contender.model == "DeepSeek-V2":  # whose gate is a softmax without renormalisation
        model["gating"] = {"name": "softmax_topk", "top_k": shape.top_k, "renormalise": False}
    wanted = TYPES.get(contender.model, "deepseek_v2")
    _, values, _ = recognise(compose(model, device="meta"), wanted, {})
    values.pop("architectures")
    return AutoConfig.for_model(**values)


class HuggingFace(Model):
    """A causal language model of transformers."""

    def __init__(self, shape: Shape, contender: Contender) -> None:
        from transformers import AutoModelForCausalLM

        config = configuration(shape, contender)
        self.module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        self.sparse = contender.tuned and contender.family != "dense"
        self.cache: Any = None

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.module(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    def choices(self, decoding: bool = False) -> list[str]:
        few = ["batched_mm"] if decoding else []  # copies a matrix per token: for few tokens only
        return ["grouped_mm", "eager", *few] if self.sparse else []

    def choose(self, choice: str) -> None:
        self.module.set_experts_implementation(choice)
        self.note = f"experts: {choice}"

    def begin(self, batch: int, length: int) -> None:
        from transformers import DynamicCache

        self.cache, self.batch = DynamicCache(config=self.module.config), batch

    def prefill(self, tokens: Tensor) -> Tensor:
        out = self.module(input_ids=tokens, cache=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def fill(self, context: int) -> None:
        self.prefill(torch.zeros(self.batch, 1, dtype=torch.long, device=self.module.device))
        for i, layer in enumerate(list(self.cache.layers)):
            new = (random_like((*t.shape[:2], context - 1, t.shape[3]), t) for t in (layer.keys, layer.values))
            self.cache.update(*new, i)

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens)

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
