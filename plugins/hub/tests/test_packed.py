"""Quantised checkpoints against their plain values, number by number, and against what transformers unpacks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import CASES, SIZES, V
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from blockwright.blocks.checkpoint.source import load
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.packed import unpack_experts, unpack_fp8, unpack_rows
from blockwright.registry import ConfigError


def e2m1(bits: int) -> float:
    """The number of four bits by the definition: sign, two of exponent (bias 1), one of fraction."""
    sign, exponent, fraction = bits >> 3, bits >> 1 & 3, bits & 1
    size = fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
    return -size if sign else size


def drawn(*shape: int, seed: int = 0, least: int = 0, most: int = 256) -> Tensor:
    return torch.randint(least, most, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_fp4_numbers_are_those_of_their_bits_times_the_scale_of_their_group() -> None:
    packed, exponents = drawn(7, 48), drawn(7, 3, seed=1, most=252)
    found = unpack_rows(packed.view(torch.int8), exponents.view(torch.float8_e8m0fnu).float())
    assert found.dtype == torch.bfloat16 and found.shape == (7, 96)
    for r in range(7):
        for c in range(96):
            bits = int(packed[r, c // 2]) >> (4 * (c % 2)) & 15
            assert found[r, c].double() == e2m1(bits) * 2.0 ** (int(exponents[r, c // 32]) - 127)


def test_fp4_is_unpacked_as_by_transformers() -> None:
    packed, exponents = drawn(5, 64), drawn(5, 4, seed=1, least=90, most=160)
    scales = exponents.view(torch.float8_e8m0fnu)
    theirs = Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), scales, torch.bfloat16)
    assert torch.equal(unpack_rows(packed.view(torch.int8), scales.float()), theirs)
    blocks, exponents = drawn(3, 6, 2, 16), drawn(3, 6, 2, seed=1, least=90, most=160)
    found = unpack_experts(blocks, exponents.view(torch.float8_e8m0fnu).float())
    assert found.shape == (3, 64, 6) and torch.equal(found, convert_moe_packed_tensors(blocks, exponents))


def test_fp8_numbers_are_multiplied_by_the_scale_of_their_block() -> None:
    weight, scales = torch.randn(37, 50).to(torch.float8_e4m3fn), torch.rand(3, 2) + 0.5
    slow = weight.float()
    for r in range(37):
        for c in range(50):
            slow[r, c] *= scales[r // 16, c // 32]
    assert torch.equal(unpack_fp8(weight, scales, (16, 32)), slow)
    assert torch.equal(unpack_fp8(weight, scales[:1, :1], (10**12, 10**12)), weight.float() * scales[0, 0])


# ---- checkpoints -----------------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}
WIDE: dict[str, dict[str, Any]] = {  # sizes that groups of 32 and blocks of 16 divide, as transformers needs
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32},
    "deepseek_v4": {"hidden_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 32, "head_dim": 16}
    | {"o_lora_rank": 32},
}


@pytest.fixture
def plain(tmp_path: Path, randomise: Callable[..., None]) -> Callable[[str], Path]:
    """A small bf16 checkpoint of a family, as transformers saves it."""

    def save(name: str) -> Path:
        architecture, settings = CASES[name]
        config = getattr(transformers, f"{architecture}Config")(**copy.deepcopy({**SIZES, **settings, **WIDE[name]}))
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).bfloat16()
        randomise(model)
        model.save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    return save


def rewritten(folder: Path, tensors: Mapping[str, Tensor], **values: Any) -> Path:
    out = folder.parent / "packed"
    out.mkdir(exist_ok=True)
    save_file(dict(tensors), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | values))
    return out


def gpt_oss(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its experts as random MXFP4 blocks."""
    found = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj")]:
        experts, columns, rows = found.pop(name).shape
        found[name + "_blocks"] = drawn(experts, rows, columns // 32, 16, seed=len(found))
        found[name + "_scales"] = drawn(experts, rows, columns // 32, seed=len(found), least=118, most=126)
    return found


def deepseek_v4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names, dtypes and scales of the released files: fp8 blocks, experts in random fp4, a layer of prediction."""
    found = {"mtp.0.attn.attn_sink": torch.zeros(6)}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.").replace("embed_tokens", "embed").replace("attn.norm.", "attn.kv_norm.")
        name = name.replace("hc_head.hc_", "hc_head_")
        scale, leaf = name.removesuffix("weight") + "scale", name.split(".")[-2] if "." in name else ""
        if ".experts." in name:
            rows, columns = tensor.shape
            found[name] = drawn(rows, columns // 2, seed=len(found)).view(torch.int8)
            exponents = drawn(rows, columns // 32, seed=len(found), least=118, most=126)
            found[scale] = exponents.view(torch.float8_e8m0fnu)
        elif leaf in ("wq_a", "wq_b", "wo_a", "wo_b", "w1", "w2", "w3") or name.endswith("attn.wkv.weight"):
            found[name] = tensor.to(torch.float8_e4m3fn)
            grid = (-(-n // 16) for n in tensor.shape)
            found[scale] = drawn(*grid, seed=len(found), least=125, most=129).view(torch.float8_e8m0fnu)
        else:
            found[name] = tensor
    return found


METHODS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], dict[str, Any]]] = {
    "gpt_oss": (gpt_oss, {"quantization_config": {"quant_method": "mxfp4"}}, {"attn_implementation": "eager"}),
    "deepseek_v4": (
        deepseek_v4,
        {"quantization_config": FP8, "expert_dtype": "fp4"},
        {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)},
    ),
}


# ---- damage ----------------------------------------------------------------------------------------------------------

UP, NORM = "model.layers.0.mlp.experts.gate_up_proj", "layers.0.attn_norm.weight"
EXPERT, QUERY = "layers.3.ffn.experts.1.w1.", "layers.0.attn.wq_a."


def bytes_of(number: int) -> Tensor:
    return torch.full((5, 64, 2), number, dtype=torch.uint8)


DAMAGE: dict[str, list[tuple[str, Callable[[dict[str, Tensor]], Any]]]] = {  # what is named, what is done
    "gpt_oss": [
        ("_scales", lambda t: t.pop(UP + "_scales")),
        *((UP, lambda t, s=s: t.update({UP + "_scales": s})) for s in (drawn(5, 64, 1), bytes_of(255), bytes_of(254))),
        (UP, lambda t: t.update({UP + "_scales": t[UP + "_scales"].long()})),
        (UP, lambda t: t.update({UP + "_blocks": drawn(5, 64, 2, 32)})),
        (UP, lambda t: t.update({UP: torch.zeros(5, 64, 64)})),  # twice
        (UP, lambda t: t.update({UP + "_blocks": drawn(6, 64, 2, 16), UP + "_scales": drawn(6, 64, 2, most=120)})),
    ],
    "deepseek_v4": [
        (EXPERT, lambda t: t.pop(EXPERT + "scale")),
        (EXPERT, lambda t: t.update({EXPERT + "scale": torch.ones(32, 3).to(torch.float8_e8m0fnu)})),
        (EXPERT, lambda t: t.update({EXPERT + "weight": drawn(32, 33).view(torch.int8)})),
        (NORM, lambda t: t.update({NORM: torch.ones(64, dtype=torch.uint8)})),
        (QUERY, lambda t: t.update({QUERY + "scale": torch.ones(1, 4)})),
        (QUERY, lambda t: t[QUERY + "weight"].view(torch.uint8).fill_(127)),  # no number
    ],
}


@pytest.mark.parametrize("name", WIDE)
@torch.no_grad()
def test_released_weights_give_the_logits_of_transformers_and_damaged_ones_are_refused(
    name: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = plain(name)
    release, values, how = METHODS[name]
    packed = rewritten(folder, release(load_file(folder / "model.safetensors")), **values)
    theirs: Any = getattr(transformers, f"{CASES[name][0]}ForCausalLM")
    theirs = theirs.from_pretrained(packed, dtype=torch.float32, **how).eval()
    import_folder(packed, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(t.dtype in (torch.bfloat16, torch.int64) for t in held.values())
    ids = torch.randint(0, V, (2, 37), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    torch.testing.assert_close(load(tmp_path / "out")(ids), expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
    for named, spoil in DAMAGE[name]:
        tensors = release(load_file(folder / "model.safetensors"))
        spoil(tensors)
        with pytest.raises(ConfigError) as caught:
            import_folder(rewritten(folder, tensors, **values), tmp_path / "no")
        assert named in str(caught.value) and not (tmp_path / "no").exists()
