"""GLM-5.3-Flash: its language model, read out of a folder as transformers saves the whole model, and written alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextConfig, Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextForConditionalGeneration, Glm5NextTextModel

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import count_parameters
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.family import difference
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError

V, D, EPS = 61, 48, 0.01
BOUND = 2e-5  # both round: in single precision alone has theirs a delta rule
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "pad_token_id": None,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 6,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "v_head_dim": 6,
    "qk_nope_head_dim": 7,
    "num_experts_per_tok": 2,
    "index_topk": 8,
    "index_kpool": 4,
    "index_head_dim": 10,
    "index_n_heads": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "rms_norm_eps": EPS,
    "swiglu_limit": 1.5,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "out_hidden_size": D,
    "projection_intermediate_size": 12,
    "image_size": 28,
}


class Both(NamedTuple):
    """transformers' model, its folder, and what the import of it leaves."""

    theirs: nn.Module
    folder: Path
    out: Path


@pytest.fixture(scope="module")
def both(randomise: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Both:
    config = Glm5NextConfig(text_config=SMALL, vision_config=VISION)
    config._experts_implementation = config.text_config._experts_implementation = "eager"
    theirs, folder = Glm5NextForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("glm5_next")
    randomise(theirs)
    theirs.save_pretrained(folder / "theirs")
    import_folder(folder / "theirs", folder / "out")
    return Both(theirs, folder / "theirs", folder / "out")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (2, 33), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal_those_of_transformers(both: Both, ids: Tensor) -> None:
    expected = both.theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(load(both.out)(ids), expected, rtol=0, atol=BOUND * expected.abs().max().item())


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_same_logits(both: Both, ids: Tensor) -> None:
    expected, decoder = both.theirs(ids).logits, load(both.out)
    caches = decoder.new_caches(2, 33)
    parts = [decoder(ids[:, a:b], caches=caches) for a, b in ((0, 9), (9, 10), *((t, t + 1) for t in range(10, 33)))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=BOUND * expected.abs().max().item())


def test_what_is_written_is_the_language_model_to_the_bit(both: Both, tmp_path: Path) -> None:
    assert export_folder(both.out, tmp_path / "hf")[0] == "glm5_next_text"
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (both.folder, tmp_path / "hf")
    )
    language = {name.replace("language_model.", ""): t for name, t in before.items() if ".visual." not in name}
    assert language.keys() == after.keys() and len(language) < len(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in language.items())
    import_folder(tmp_path / "hf", tmp_path / "again")
    first, again = (load(out).state_dict() for out in (both.out, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first | again)


def settings(**changes: Any) -> dict[str, Any]:
    given = {**Glm5NextTextConfig(**SMALL).to_dict(), **changes}
    return {key: value for key, value in given.items() if value is not None or key == "linear_lower_bound"}


OTHER_MODELS: list[tuple[str, Any]] = [
    *(("index_topk", 9), ("indexer_types", ["full", "full", "full", "shared", "full"]), ("linear_lower_bound", 5.0)),
    *(("index_kpool_always_select_tail", False), ("mlp_layer_types", ["dense"] * 5), ("q_lora_rank", None)),
    *(("layer_types", ["linear_attention"] * 5), ("layer_types", ["linear_attention"]), ("attention_bias", True)),
]


@pytest.mark.parametrize(("key", "value"), OTHER_MODELS)
def test_what_would_be_another_model_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILIES["glm5_next_text"].composition(settings(**{key: value}))
    assert caught.value.path == f"config.json: {key}"
    whole = {"text_config": settings(**{key: value}), "vision_config": {}}
    with pytest.raises(ConfigError) as caught:
        FAMILIES["glm5_next"].composition(whole)
    assert caught.value.path == f"config.json: text_config.{key}"


@pytest.mark.parametrize("lowest", [-5.0, -2.0, None])
def test_keys_of_copies_mean_the_same_model(lowest: float | None) -> None:
    flat = {"linear_num_heads": None, "linear_head_dim": None, "linear_conv_kernel_dim": None}
    inner = {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4, "gate_lower_bound": lowest}
    copied = settings(**flat, linear_attn_config={**inner, "safe_gate": lowest is not None})
    found, expected = (
        compose(FAMILIES["glm5_next_text"].composition(values), device="meta")
        for values in (copied, settings(linear_lower_bound=lowest))
    )
    assert difference(found, expected) is None
    assert settings(**FAMILIES["glm5_next_text"].config(found))["linear_lower_bound"] == lowest


def test_preset_has_as_many_parameters_as_their_class() -> None:
    with torch.device("meta"):
        theirs = Glm5NextTextModel(Glm5NextTextConfig())
    head = 154_880 * 4096
    ours = compose(preset("glm_5_3_flash"), device="meta")
    assert count_parameters(ours).total == sum(p.numel() for p in theirs.parameters()) + head == 313_326_816_766
