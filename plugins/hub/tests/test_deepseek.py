"""What no class of ``transformers`` writes: DeepSeekMoE, VL2's sigmoid gate, heads of multi-token prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import CASES, LAYERS, MIXTURE, ROPE, SIZES, D, V
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockwright.blocks.checkpoint.source import load
from blockwright.plugins.hub import hf_import
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint of one file."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts as the released checkpoints have them, each by itself."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        at, stacked, part = name.partition("mlp.experts.")
        for e, expert in enumerate(tensor if stacked else ()):
            if part == "gate_up_proj":
                gate, up = expert.chunk(2)
                found[f"{at}mlp.experts.{e}.gate_proj.weight"] = gate.clone()
                found[f"{at}mlp.experts.{e}.up_proj.weight"] = up.clone()
            else:
                found[f"{at}mlp.experts.{e}.down_proj.weight"] = expert.clone()
        if not stacked:
            found[name] = tensor
    return found


@torch.no_grad()
def test_deepseek_moe_equals_the_text_model_of_deepseek_ocr2(
    randomise: Callable[..., None],
    in_double: Callable[..., None],
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The one class of ``transformers`` with multi-head attention and DeepSeek's experts."""
    from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as module

    dtype = torch.float64
    types = ["dense"] + ["sparse"] * (LAYERS - 1)
    D = 36
    heads = {"hidden_size": D, "num_attention_heads": 6, "num_key_value_heads": 6}
    experts = {k: v for k, v in MIXTURE.items() if k != "first_k_dense_replace"}
    config = module.DeepseekOcr2TextConfig(**{**SIZES, **heads, **experts, **ROPE}, mlp_layer_types=types)
    config._experts_implementation = "eager"
    model = module.DeepseekOcr2TextModel(config).to(dtype).eval()
    randomise(model)
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(4), dtype=dtype) / D**0.5
    tensors = {f"model.{k}": v for k, v in apart(model.state_dict()).items()} | {"lm_head.weight": head}
    released = {**SIZES, **heads, **MIXTURE, "model_type": "deepseek", "rope_theta": 500.0, "rope_scaling": None}
    more = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "scoring_func": "softmax", "norm_topk_prob": False}
    extra = {"aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "auto_map": {"AutoConfig": "x.Y"}}
    import_folder(written(tmp_path, tensors, {**released, **more, **extra}), tmp_path / "out")
    decoder = load(tmp_path / "out", dtype=dtype)
    holder = nn.Module()
    holder.model = model
    in_double(holder, decoder, monkeypatch)
    expected = model(tokens).last_hidden_state @ head.T
    torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=1e-10)
    export_folder(tmp_path / "out", tmp_path / "hf")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == tensors.keys() and all(torch.equal(after[k], v) for k, v in tensors.items())


@pytest.mark.slow
@torch.no_grad()
def test_sigmoid_gate_under_v2s_name_is_v3s(
    checkpoint: Callable[..., Path], foreign: Callable[..., nn.Module], tokens: Tensor, tmp_path: Path
) -> None:
    """As VL2 base has it."""
    folder = checkpoint("deepseek_v3")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "deepseek_v2", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    for key in ("rope_interleave", "num_nextn_predict_layers"):
        values.pop(key)
    (folder / "config.json").write_text(json.dumps(values))
    import_folder(folder, tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")(tokens), foreign("deepseek_v3")(tokens).logits, rtol=0, atol=1e-5)
    assert export_folder(tmp_path / "out", tmp_path / "hf") == ("deepseek_v3", None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "DeepseekV3ForCausalLM"


def test_unknown_gate_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("deepseek_v2")
    plain = json.loads((folder / "config.json").read_text())
    others = {"scoring_func": "sigmoid", "topk_method": "soft", "moe_layer_freq": 2, "first_k_dense_replace": 9}
    for key, value in others.items():
        (folder / "config.json").write_text(json.dumps({**plain, key: value}))
        with pytest.raises(ConfigError) as caught:
            import_folder(folder, tmp_path / "out")
        assert caught.value.path == f"config.json: {key}"


# ---- heads of multi-token prediction ---------------------------------------------------------------------------------


@pytest.fixture(params=["deepseek_v3", "glm4_moe"])
def predicting(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    """A V3, or a GLM-4.5, whose head of prediction stands behind the last layer, as released."""
    folder = checkpoint(request.param)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(6)
    last, behind = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    for name in [n for n in tensors if n.startswith(last)]:
        tensors[name.replace(last, behind)] = torch.randn(tensors[name].shape, generator=generator)
    for name, shape in {"enorm": (D,), "hnorm": (D,), "eh_proj": (D, 2 * D), "shared_head.norm": (D,)}.items():
        tensors[f"{behind}{name}.weight"] = torch.randn(shape, generator=generator)
    tensors[f"{behind}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{behind}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    values = {**json.loads((folder / "config.json").read_text()), "num_nextn_predict_layers": 1}
    return written(folder, tensors, values)


@pytest.mark.parametrize("predicting", ["deepseek_v3"], indirect=True)
def test_heads_of_prediction_are_left_out_unless_asked_for(predicting: Path, tokens: Tensor, tmp_path: Path) -> None:
    import_folder(predicting, tmp_path / "without")
    import_folder(predicting, tmp_path / "with", mtp=True)
    without, whole = (load_file(tmp_path / x / "model.safetensors") for x in ("without", "with"))
    assert not any(name.startswith("mtp") for name in without)
    further = {name: tensor for name, tensor in whole.items() if name.startswith("mtp.0.")}
    assert {**without, **further}.keys() == whole.keys() and len(further) > 10
    theirs = load_file(predicting / "model.safetensors")
    assert torch.equal(further["mtp.0.project.weight"], theirs[f"model.layers.{LAYERS}.eh_proj.weight"])
    assert torch.equal(further["mtp.0.embedding_norm.weight"], theirs[f"model.layers.{LAYERS}.enorm.weight"])
    assert torch.equal(load(tmp_path / "with")(tokens), load(tmp_path / "without")(tokens))


def test_heads_of_prediction_come_out_as_they_went_in(predicting: Path, tmp_path: Path) -> None:
    assert hf_import.main([str(predicting), str(tmp_path / "out"), "--mtp"]) == 0
    family = json.loads((predicting / "config.json").read_text())["model_type"]
    assert export_folder(tmp_path / "out", tmp_path / "hf") == (family, None)
    before, after = (load_file(folder / "model.safetensors") for folder in (predicting, tmp_path / "hf"))
    assert before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("predicting", ["glm4_moe"], indirect=True)
def test_repeated_embedding_that_differs_is_refused(predicting: Path, tmp_path: Path) -> None:
    tensors = load_file(predicting / "model.safetensors")
    tensors[f"model.layers.{LAYERS}.embed_tokens.weight"][3, 3] += 1
    save_file(tensors, predicting / "model.safetensors")
    with pytest.raises(ConfigError, match=r"must equal embedding\.weight"):
        import_folder(predicting, tmp_path / "out", mtp=True)
    assert not (tmp_path / "out").exists()
    import_folder(predicting, tmp_path / "out")


def test_missing_head_of_prediction_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("deepseek_v3")
    values = {**json.loads((folder / "config.json").read_text()), "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"model\.layers\.{LAYERS}\."):
        import_folder(folder, tmp_path / "out", mtp=True)


def test_every_case_of_deepseek_is_among_the_models() -> None:
    assert {"deepseek_v2", "deepseek_v2 yarn", "deepseek_v2 q_lora", "deepseek_v2 q_lora yarn"} <= CASES.keys()
