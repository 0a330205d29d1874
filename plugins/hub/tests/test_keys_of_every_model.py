"""What config.json has whatever the family: no key that transformers writes for every model is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from foreign_models import CASES, CONFIGS, SIZES
from pairwise import each
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from blockwright.blocks.compose import compose
from blockwright.plugins.hub.config import idle
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.importing import find
from blockwright.registry import presets

# Families whose classes transformers has not, and a preset that is written as one.
NO_CLASS = {"deepseek": "deepseek_moe_16b", "deepseek_vl_v2": "deepseek_vl2_tiny"}
TOKENS = [f"{name}_id" for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES]
# Of files that transformers 4 and other tools wrote, which 5.24 reads too.
OLDER = {
    "_attn_implementation_autoset": True,
    "_commit_hash": "1a2b",
    "_flash_attn_2_enabled": True,
    "_num_labels": 2,
    "add_cross_attention": False,
    "attn_implementation": "eager",
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": 3,
    "experts_implementation": "eager",
    "finetuning_task": None,
    "gradient_checkpointing": False,
    "is_decoder": False,
    "num_labels": 2,
    "output_attentions": False,
    "output_past": True,
    "prefix": None,
    "pruned_heads": {},
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_last_hidden_states": True,
    "tokenizer_class": "LlamaTokenizer",
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "use_bfloat16": False,
    "xla_device": None,
}


def saved(model_type: str, use_diff: bool, **ids: int) -> dict[str, Any]:
    """The config.json of a family as transformers writes it, the first of the tiny models where there is one."""
    if model_type in NO_CLASS:
        text = FAMILIES[model_type].config(
            compose({**presets.read(NO_CLASS[model_type]), "n_layers": 2}, device="meta")
        )
        return {**PreTrainedConfig().to_dict(), **text, **ids}
    kind = CONFIG_MAPPING[model_type]
    cases = {CONFIGS.get(name, f"{name}Config"): given for name, given in reversed(CASES.values())}
    given = {**SIZES, **cases[kind.__name__]} if kind.__name__ in cases else {}
    config = kind(**copy.deepcopy(given))
    for one in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for key, value in ids.items():
            setattr(one, key, value)
    return json.loads(config.to_json_string(use_diff=use_diff))


@pytest.mark.parametrize(("model_type", "use_diff"), each(list(FAMILIES), [True, False]))
def test_keys_of_every_model_change_nothing_and_are_read(model_type: str, use_diff: bool) -> None:
    plain = saved(model_type, use_diff)
    known = find(plain).composition(plain)
    values = saved(model_type, use_diff, **dict.fromkeys(TOKENS, 3))
    assert {*TOKENS} <= values.keys()
    assert find(values).composition(values) == known
    everywhere = {key: value or 1 for key, value in GenerationConfig().to_dict().items()} | OLDER
    values |= {key: value for key, value in everywhere.items() if key not in plain}
    assert find(values).composition(values) == known


def test_a_reason_is_known_for_each_key_that_transformers_writes_for_every_model() -> None:
    keys = {*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict(), *TOKENS} - {"model_type"}
    assert {key for key in keys if not idle(key)} == set()
