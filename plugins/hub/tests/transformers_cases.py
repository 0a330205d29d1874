"""Compositions under transformers' own tests of models. Not collected here: see test_transformers_suite.py.

A process imports this with a checkout of transformers in front of its path, whose package ``tests`` has the mixins.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from blockwright.plugins.hub.transformers import BlockwrightConfig, BlockwrightForCausalLM, BlockwrightModel

BASE = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "max_positions": 512, "position": "rope", "norm": "rmsnorm"}
BASE |= {"residual": "prenorm", "ffn": {"name": "swiglu", "d_ff": 48}}
MOE = {"ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 16}}}
MOE |= {"gating": {"name": "softmax_topk", "top_k": 2}, "experts": {"name": "swiglu", "d_ff": 16}}
LATENT = {"name": "mla", "n_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 8}
LOCAL = {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 4}
DELTA = {"name": "kda", "n_heads": 2, "head_dim": 16}
GQA = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "mha": {"attention": {"name": "mha", "n_heads": 2}},
    "windows": {
        "attention": GQA,
        "variants": {"attention": {"local": LOCAL}},
        "layout": {"attention": "local attention"},
    },
    "mla_moe": {"attention": LATENT, **MOE},
    "hybrid": {
        "attention": GQA,
        "variants": {"attention": {"linear": DELTA}},
        "layout": {"attention": "linear attention"},
    },
}


# The mixins know by these tables which model has a loss.
MODEL_MAPPING_NAMES["blockwright"] = "BlockwrightModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["blockwright"] = "BlockwrightForCausalLM"


class Tester:
    """What the mixins ask about a model.

    Args:
        composition: changes of ``BASE``
    """

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, vocab_size = BASE["d_model"], BASE["n_layers"], BASE["vocab_size"]
    num_attention_heads = 2

    def __init__(self, composition: dict[str, Any]) -> None:
        self.composition = {**BASE, **composition}

    def get_config(self) -> BlockwrightConfig:
        config = BlockwrightConfig(self.composition, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        config.layer_types = [
            "linear_attention",
            "full_attention",
        ]  # a test of padding skips a model without recurrence
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[BlockwrightConfig, dict[str, torch.Tensor]]:
        set_seed(0)
        tokens = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Suite(ModelTesterMixin, GenerationTesterMixin):
    """Both mixins, of the model and of the one with a head."""

    all_model_classes = (BlockwrightModel, BlockwrightForCausalLM)
    has_attentions = False  # kernels form no attention maps
    test_resize_embeddings = False  # the vocabulary is part of the composition
    composition: dict[str, Any]

    def setUp(self) -> None:
        self.model_tester = Tester(self.composition)

    def test_left_padding_compatibility(self) -> None:
        """Which the mixin skips where there are no attention maps."""
        self.has_attentions = True
        super().test_left_padding_compatibility()

    def _check_cache_for_generate(self, batch_size: int, cache: Any, seq_length: int, config: Any) -> None:
        assert (cache.batch_size, cache.get_seq_length(), len(cache)) == (
            batch_size,
            seq_length,
            self.model_tester.num_hidden_layers,
        )

    def _check_caches_are_equal(self, cache1: Any, cache2: Any) -> None:
        assert cache1.get_seq_length() == cache2.get_seq_length()
        for one, other in zip(cache1.held, cache2.held, strict=True):
            for name, values in one.buffers.items():
                n = min(values.shape[1], other.buffers[name].shape[1], one.length) if one.fills else None
                torch.testing.assert_close(values[:, :n], other.buffers[name][:, :n])


for name, composition in COMPOSITIONS.items():
    made = type(f"Test_{name}", (Suite, unittest.TestCase), {"composition": composition, "__module__": __name__})
    globals()[made.__name__] = made
del made
