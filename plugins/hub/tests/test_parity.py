"""Released formats in and out: the same logits, the same bits. And models that no family describes, copied by name."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import CASES, as_loaded, filled
from safetensors.torch import load_file
from torch import Tensor, nn

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.llama_like import ATTENTION, FRAME, LAYER, PRENORM
from blockwright.plugins.hub.names import Row, one_of

Make = Callable[..., Any]
# One worker of xdist takes all of a case: its model and its import are made once.
EVERY = [pytest.param(name, marks=pytest.mark.xdist_group(f"parity {name}")) for name in CASES]
QUICK = ("llama yarn", "gpt2", "gpt_oss", "gemma4_text experts", "qwen3_5_text", "kimi_linear", "inkling_text")
QUICK += ("longcat_flash", "nemotron_h latent", "deepseek_v2 q_lora yarn", "deepseek_v4")
GRADIENTS = ("qwen3_5_text", "glm_moe_dsa reused", "longcat_flash")


@pytest.fixture(scope="module")
def both(foreign: Make, checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """transformers' model of a case, its folder, and that which its import leaves, which tests only read."""

    @functools.lru_cache(maxsize=2)
    def make(name: str) -> tuple[nn.Module, Path, Path]:
        folder, out = checkpoint(name), tmp_path_factory.mktemp("imported") / "out"
        import_folder(folder, out)
        return foreign(name), folder, out

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_imported_logits_equal_transformers_in_single_precision(name: str, both: Make, tokens: Tensor) -> None:
    theirs, _, out = both(name)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    # Torch's norm adds up in the order of transformers; the fused one does not, and is compared in double precision.
    decoder = load(out).choose_kernels({"rms_norm": "torch"})
    bound = 1e-5 * max(1.0, expected.abs().max().item())  # which library multiplies depends on the machine
    torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=bound)
    exact = load(out, dtype=torch.float64)(tokens).float()
    torch.testing.assert_close(decoder.choose_kernels()(tokens), exact, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_imported_logits_equal_transformers_in_double_precision(
    name: str, foreign: Make, checkpoint: Make, tokens: Tensor, in_double: Make, monkeypatch: Any, tmp_path: Path
) -> None:
    """And, of three, the gradients of the embedding, which all layers have a part in."""
    import_folder(checkpoint(name, torch.float64), tmp_path / "out")
    decoder, theirs = load(tmp_path / "out", dtype=torch.float64), foreign(name, torch.float64)
    in_double(theirs, decoder, monkeypatch)
    with torch.set_grad_enabled(name in GRADIENTS):
        found, expected = decoder(tokens), theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if name in GRADIENTS:
        embeddings = decoder.embedding.weight, theirs.get_input_embeddings().weight
        weights = torch.linspace(-1, 1, tokens.numel() * len(embeddings[0])).double().view(*tokens.shape, -1)
        ours, wanted = (
            torch.autograd.grad((logits * weights).mean(), embedding)[0]
            for logits, embedding in zip((found, expected), embeddings, strict=True)
        )
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-7 * wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_decoding_with_a_cache_equals_transformers_with_its_own(name: str, both: Make, tokens: Tensor) -> None:
    """From within windows to beyond them, and across the ends of groups that are compressed."""
    theirs, _, out = both(name)
    decoder = load(out)
    exact = load(out, dtype=torch.float64)(tokens[:, :18])  # which is theirs to 1e-10, as the test above shows
    bound = 1e-5 * exact.abs().max().item()
    caches, cache = decoder.new_caches(2, 30), None
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), *((t, t + 1) for t in range(10, 18))):
        found = theirs(tokens[:, start:end], cache=cache, use_cache=True)
        cache = found.past_key_values
        ours = decoder(tokens[:, start:end], caches=caches)
        torch.testing.assert_close(ours.double(), exact[:, start:end], rtol=0, atol=bound, msg=f"token {start}")
        # Each rounds in its own way: from one another they may be twice as far as from what is exact.
        torch.testing.assert_close(ours, found.logits, rtol=0, atol=2 * bound, msg=f"token {start}")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_what_is_imported_and_exported_is_the_same_to_the_bit_and_gives_transformers_its_logits(
    name: str, both: Make, tokens: Tensor, tmp_path: Path
) -> None:
    theirs, folder, out = both(name)
    assert export_folder(out, tmp_path / "hf", max_bytes=50_000)[0] == name.split()[0]
    before, after = (
        {key: tensor for file in place.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for place in (folder, tmp_path / "hf")
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("origin.json"))  # the composition alone
    export_folder(tmp_path / "out", tmp_path / "alone")
    as_loaded(tmp_path / "alone", theirs.config)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "alone", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for parameter in again.parameters():
        parameter.data = parameter.data.clone()  # products of memory that is not aligned may round otherwise
    found, expected = again.eval()(tokens[:, :40]).logits, theirs(tokens[:, :40]).logits
    if type(again) is type(theirs):
        assert torch.equal(found, expected)
    else:  # the same model of another class, whose products round otherwise
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- models that no family of them describes -------------------------------------------------------------------------

V, D = 97, 40
GLM4 = (
    *(*FRAME, *PRENORM, *ATTENTION),
    Row("layers.{i}.residual.attention_out_norm.weight", LAYER + "post_self_attn_layernorm.weight"),
    Row("layers.{i}.residual.ffn_out_norm.weight", LAYER + "post_mlp_layernorm.weight"),
    Row("layers.{i}.ffn.gate.weight", LAYER + "mlp.gate_up_proj.weight", form=one_of(2, 0)),
    Row("layers.{i}.ffn.up.weight", LAYER + "mlp.gate_up_proj.weight", form=one_of(2, 1)),
    Row("layers.{i}.ffn.down.weight", LAYER + "mlp.down_proj.weight"),
)
GPTJ = (
    Row("embedding.weight", "transformer.wte.weight"),
    Row("norm.*", "transformer.ln_f.*"),
    Row("head.weight", "lm_head.weight"),
    Row("layers.{i}.residual.attention_norm.*", "transformer.h.{i}.ln_1.*"),
    *(
        Row(f"layers.{{i}}.attention.{our}.weight", f"transformer.h.{{i}}.attn.{their}_proj.weight")
        for our, their in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out"))
    ),
    Row("layers.{i}.ffn.up.*", "transformer.h.{i}.mlp.fc_in.*"),
    Row("layers.{i}.ffn.down.*", "transformer.h.{i}.mlp.fc_out.*"),
)
BLOCK = "transformer.blocks.{i}."
MPT = (
    Row("embedding.weight", "transformer.wte.weight"),
    Row("norm.weight", "transformer.norm_f.weight"),
    Row("layers.{i}.residual.attention_norm.weight", BLOCK + "norm_1.weight"),
    Row("layers.{i}.residual.ffn_norm.weight", BLOCK + "norm_2.weight"),
    *(
        Row(f"layers.{{i}}.attention.{name}.weight", BLOCK + "attn.Wqkv.weight", form=one_of(3, n))
        for n, name in enumerate(("query", "key", "value"))
    ),
    Row("layers.{i}.attention.output.weight", BLOCK + "attn.out_proj.weight"),
    *(Row(f"layers.{{i}}.ffn.{m}.weight", BLOCK + f"ffn.{m}_proj.weight") for m in ("up", "down")),
)
ROPE = {"name": "rope", "rotary_fraction": 0.5, "pairing": "interleaved"}
LAYERNORM = {"name": "layernorm", "eps": 1e-5}
# Name → its settings, ours, and the names of the weights.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Row, ...]]] = {
    "GPTJ": (
        {"vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 5, "n_positions": 64, "rotary_dim": 4, "n_inner": 37}
        | {"tie_word_embeddings": False},
        {"attention": {"name": "mha", "n_heads": 5}, "position": ROPE, "residual": "parallel"}
        | {"ffn": {"name": "gelu", "d_ff": 37, "bias": True}, "norm": LAYERNORM},
        GPTJ,
    ),
    "Mpt": (
        {"d_model": D, "n_heads": 4, "n_layers": 3, "vocab_size": V, "max_seq_len": 64},
        {"attention": {"name": "mha", "n_heads": 4}, "position": "alibi", "tie_embeddings": True}
        | {"ffn": {"name": "gelu", "approximate": "none"}, "norm": {**LAYERNORM, "bias": False}},
        MPT,
    ),
    "Glm4": (
        {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 1}
        | {"head_dim": 12, "intermediate_size": 37, "attention_bias": False, "rms_norm_eps": 1e-5, "pad_token_id": 0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
        | {"eos_token_id": 0},
        {"attention": {"name": "gqa", "n_heads": 5, "n_kv_heads": 1, "head_dim": 12}, "residual": "sandwich"}
        | {"position": {**ROPE, "theta": 500.0}, "ffn": {"name": "swiglu", "d_ff": 37}},
        GLM4,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_logits_equal_those_of_other_models(name: str, randomise: Make, tokens: Tensor) -> None:
    settings, ours, table = OTHERS[name]
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()
    randomise(theirs)
    if isinstance(getattr(theirs.get_output_embeddings(), "bias", None), Tensor):
        theirs.lm_head.bias.zero_()
    frame = {"vocab_size": V, "d_model": D, "n_layers": 3, "max_positions": 64, "residual": "prenorm"}
    decoder = compose({**frame, "norm": {"name": "rmsnorm", "eps": 1e-5}, **ours}).eval()
    assert filled(decoder, table, theirs) <= {"lm_head.weight", "lm_head.bias"}  # tied, or zero
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=2e-5)
