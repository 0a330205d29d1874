"""A model of ours, trained or imported, as others load it; and what no family describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.plugins.hub import hf_export, hf_import
from blockwright.plugins.hub.exporting import export_folder, recognise
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.fingerprint import difference
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of training, around a freshly made model."""

    def save(model: dict[str, Any], name: str = "some.ckpt") -> Path:
        decoder = compose(model, seed=3)
        weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
        torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, tmp_path / name)
        return tmp_path / name

    return save


Tiny = Callable[..., dict[str, Any]]


def family_of(model: dict[str, Any]) -> tuple[str, str | None]:
    """What a composition is exported as, and why not as another."""
    found, _, why = recognise(compose(model, device="meta"), None, {})
    return found.model_type, why


@pytest.mark.parametrize("tokenizer", ["bpe", pytest.param("chars", marks=pytest.mark.slow)])
@torch.no_grad()
def test_trained_run_is_loaded_by_transformers_with_its_tokenizer(
    tokenizer: str, fit: Callable[..., L.Trainer], corpus_file: Path, tmp_path: Path
) -> None:
    llama = ("model/attention=gqa", "model/ffn=swiglu", "model.layout.ffn=ffn*")
    sizes = ("model.attention.n_heads=4", "model.scale_embeddings=false")  # Llama's embeddings are not scaled
    trainer = fit(*llama, f"data/tokenizer={tokenizer}", *sizes)
    run = tmp_path / "run"
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
    assert hf_export.main([str(run), str(tmp_path / "hf"), "--max-shard-size", "100KB"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = corpus_file.read_text()[:200]
    ours = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
    ids = torch.tensor([words.encode(text)])
    assert ids[0].tolist() == ours.encode(text).tolist()
    task = trainer.lightning_module.eval()
    torch.testing.assert_close(model(ids[:, :60]).logits, task(ids[:, :60]), rtol=0, atol=1e-5)
    assert model.generation_config.eos_token_id == words.eos_token_id == ours.eos
    assert words.model_max_length == model.config.max_position_embeddings
    assert words.unk_token_id == (0 if tokenizer == "chars" else None)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()


@torch.no_grad()
def test_composition_outside_the_families_is_written_as_our_own_and_read_back(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(moe=True, position={"name": "alibi"}, attention={"name": "mla", "n_heads": 4})
    path = saved(model)
    assert hf_export.main([str(path), str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "No family of transformers describes this composition" in said and "'blockwright'" in said
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    assert values["model_type"] == "blockwright" and values["composition"]["position"]["name"] == "alibi"
    assert hf_import.main([str(tmp_path / "own"), str(tmp_path / "out")]) == 0
    tokens = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(tmp_path / "out")(tokens), load(path)(tokens))


def test_untrusted_composition_builds_registered_blocks_only(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    export_folder(saved(tiny(position={"name": "alibi"})), tmp_path / "own")
    file = tmp_path / "own" / "config.json"
    values = json.loads(file.read_text())
    values["composition"]["norm"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="_target_"):
        import_folder(tmp_path / "own", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"name": "mha", "n_heads": 4}},
        {"attention": {"name": "gqa", "head_dim": 6}},
        {"attention": "gqa", "ffn": {"name": "swiglu"}, "norm": "rmsnorm"},
        {"variants": {"ffn": {"other": {"name": "gelu"}}}},  # which no layer uses
        {"overrides": [{"layers": 0, "attention": {"head_dim": 6}}]},
        {"init": {"std": 0.5, "depth_scaled": True}},
    ],
)
def test_compositions_are_recognised_by_what_they_build(changes: dict[str, Any], tiny: Tiny) -> None:
    if "overrides" in changes:
        changes = {**changes, "attention": {"name": "gqa", "head_dim": 6}}
    assert family_of(tiny(**changes)) == ("llama", None)


def test_what_serves_training_only_is_no_matter(tiny: Tiny) -> None:
    gating = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.5, "balance": {"name": "expert", "alpha": 0.01}}
    rope = {"name": "rope", "pairing": "interleaved"}
    ffn = {"name": "moe", "n_experts": 6, "shared": {"name": "swiglu", "d_ff": 24}}
    model = tiny(moe=True, attention={"name": "mla"}, position=rope, gating=gating, ffn=ffn)
    assert family_of(model) == ("deepseek_v3", None)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"position": {"name": "rope", "pairing": "interleaved"}}, "interleaved"),
        ({"position": {"name": "rope", "rotary_fraction": 0.34}}, "rotary_dim"),
        ({"overrides": [{"layers": 1, "position": {"theta": 7.0}}]}, "layers.1.attention.position.theta"),
        ({"position": {"name": "yarn", "pairing": "half_split"}}, "model.position.mscale_all_dim is 1, and 0 in"),
    ],
)
def test_model_that_differs_in_one_thing_is_not_passed_off_as_a_family(
    changes: dict[str, Any], difference: str, tiny: Tiny
) -> None:
    found, why = family_of(tiny(**changes))
    assert found == "blockwright" and difference in str(why)


def test_gate_that_chooses_in_another_way_is_not_passed_off_as_mixtrals(tiny: Tiny) -> None:
    mixture = {"ffn": {"name": "moe", "n_experts": 8}, "variants": None, "layout": None}
    for name in ("softmax_topk", "topk_softmax"):
        usual = {"name": name, "top_k": 2} | ({"renormalise": True} if name == "softmax_topk" else {})
        assert family_of(tiny(moe=True, **mixture, gating=usual)) == ("mixtral", None)
    for gate in ("expert_choice", "sinkhorn", "group_limited", "hash"):
        found, why = family_of(tiny(moe=True, **mixture, gating={"name": gate, "top_k": 2}))
        assert found == "blockwright" and "gating" in str(why), gate


def test_heads_that_transformers_refuses_in_a_family_are_exported_as_another(tiny: Tiny) -> None:
    wide = {"name": "gqa", "n_heads": 10, "head_dim": 8}
    assert family_of(tiny(attention=wide)) == ("mistral", None)  # its configuration takes 48 over 10 heads, Llama's not
    whole = {"name": "gqa", "n_heads": 4, "head_dim": 8, "qk_norm": "full"}
    mixture = {"ffn": {"name": "moe", "n_experts": 8}, "variants": None, "layout": None}
    assert family_of(tiny(moe=True, **mixture, attention={**whole, "head_dim": 12}))[0] == "olmoe"
    assert family_of(tiny(moe=True, **mixture, attention=whole))[0] == "blockwright"


def test_renormalised_weights_are_not_left_to_a_class_that_ignores_them(tiny: Tiny) -> None:
    latent = {"attention": {"name": "mla"}, "position": {"name": "rope", "pairing": "interleaved"}}
    latent["ffn"] = {"name": "moe", "n_experts": 6, "shared": {"name": "swiglu", "d_ff": 24}}
    for renormalise, family in ((False, "deepseek_v2"), (True, "blockwright")):
        gating = {"name": "softmax_topk", "top_k": 2, "renormalise": renormalise}
        assert family_of(tiny(moe=True, **latent, gating=gating))[0] == family


def test_family_that_is_insisted_on_must_describe_the_model(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    path = saved(tiny())
    assert export_folder(path, tmp_path / "mistral", family="mistral") == ("mistral", None)
    for family, word in (("gpt2", "does not describe this model"), ("lama", "not a known family")):
        with pytest.raises(ConfigError, match=word):
            export_folder(path, tmp_path / "no", family=family)
    assert not (tmp_path / "no").exists()


def test_dtype_and_size_of_shards_are_the_ones_asked_for(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    arguments = [str(saved(tiny())), str(tmp_path / "hf"), "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    assert hf_export.main(arguments) == 0
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert index["weight_map"].keys() == tensors.keys() and len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(len(load_file(f)) == 1 or sum(t.nbytes for t in load_file(f).values()) <= 20_000 for f in files)


@pytest.mark.parametrize("size", ["0", "big", "-5GB", "5 apples", "5"])
def test_size_that_is_none_is_refused(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_export.main([str(tmp_path), str(tmp_path / "hf"), f"--max-shard-size={size}"]) == 64
    assert f"{size!r} is not a size; write 5GB or 200MB" in capsys.readouterr().err


def test_difference_is_none_for_the_same_and_names_what_differs(tiny: Tiny) -> None:
    one = compose(tiny(moe=True), device="meta")
    assert difference(one, compose(tiny(moe=True), device="meta")) is None
    other = compose(tiny(moe=True, gating={"name": "softmax_topk", "top_k": 2, "scaling": 2.0}), device="meta")
    assert difference(one, other) == "layers.1.ffn.gating.scaling: 1.0 here, 2.0 there"


@pytest.mark.parametrize("attention", ["gqa", "mla", "kda"])
def test_family_of_another_kind_of_model_says_what_is_lacking(
    attention: str, tiny: Callable[..., dict[str, Any]]
) -> None:
    """In words, whichever family is asked for."""
    decoder = compose(tiny(attention={"name": attention}, residual={"name": "sandwich"}), device="meta")
    for family in FAMILIES:
        with pytest.raises(ConfigError) as found:
            recognise(decoder, family, {})
        said = found.value.rule
        assert not any(words in said for words in ("object has no attribute", "()", "NoneType", "argument")), said
