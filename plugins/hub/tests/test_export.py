"""A model of ours, trained or imported, as others load it with its tokenizer; and what no family describes."""

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
from blockwright.plugins.hub.family import difference
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers import files as tokenizer
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars, Tokenizer

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of training, around a freshly made model."""

    def save(model: dict[str, Any]) -> Path:
        decoder = compose(model, seed=3)
        weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
        torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, tmp_path / "some.ckpt")
        return tmp_path / "some.ckpt"

    return save


@pytest.mark.parametrize("words", ["bpe", pytest.param("chars", marks=pytest.mark.slow)])
@torch.no_grad()
def test_trained_run_is_loaded_by_transformers_with_its_tokenizer(
    words: str, fit: Callable[..., L.Trainer], corpus_file: Path, tmp_path: Path
) -> None:
    llama = ("model/attention=gqa", "model/ffn=swiglu", "model.layout.ffn=ffn*")
    sizes = ("model.attention.n_heads=4", "model.scale_embeddings=false", "trainer.max_steps=1")  # as Llama's
    trainer = fit(*llama, f"data/tokenizer={words}", *sizes)
    run = tmp_path / "run"
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
    assert hf_export.main([str(run), str(tmp_path / "hf"), "--max-shard-size", "100KB"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = corpus_file.read_text()[:200]
    ours = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
    ids = torch.tensor([theirs.encode(text)])
    assert ids[0].tolist() == ours.encode(text).tolist()
    task = trainer.lightning_module.eval()
    torch.testing.assert_close(model(ids[:, :60]).logits, task(ids[:, :60]), rtol=0, atol=1e-5)
    assert model.generation_config.eos_token_id == theirs.eos_token_id == ours.eos
    assert theirs.model_max_length == model.config.max_position_embeddings
    assert theirs.unk_token_id == (0 if words == "chars" else None)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()


@torch.no_grad()
def test_composition_outside_the_families_is_written_as_our_own_and_read_back(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    path = saved(tiny(moe=True, position={"name": "alibi"}, attention={"name": "mla", "n_heads": 4}))
    assert hf_export.main([str(path), str(tmp_path / "own")]) == 0
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    assert values["model_type"] == "blockwright" and values["composition"]["position"]["name"] == "alibi"
    assert hf_import.main([str(tmp_path / "own"), str(tmp_path / "out")]) == 0
    tokens = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(tmp_path / "out")(tokens), load(path)(tokens))


INTERLEAVED = {"name": "rope", "pairing": "interleaved"}
EIGHT: dict[str, Any] = {"moe": True, "ffn": {"name": "moe", "n_experts": 8}, "variants": None, "layout": None}
LATENT: dict[str, Any] = {"moe": True, "attention": {"name": "mla"}, "position": INTERLEAVED}
LATENT["ffn"] = {"name": "moe", "n_experts": 6, "shared": {"name": "swiglu", "d_ff": 24}}
BIAS = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.5, "balance": {"name": "expert", "alpha": 0.01}}
TOP2, WHOLE = {"name": "softmax_topk", "top_k": 2}, {"name": "gqa", "n_heads": 4, "head_dim": 8, "qk_norm": "full"}
# What a composition is exported as; of our own, what the nearest family differs in.
EXPORTED: list[tuple[dict[str, Any], str, str]] = [
    ({"attention": {"name": "mha", "n_heads": 4}}, "llama", ""),
    ({"attention": {"name": "gqa", "head_dim": 6}}, "llama", ""),
    ({"attention": "gqa", "ffn": {"name": "swiglu"}, "norm": "rmsnorm"}, "llama", ""),
    ({"variants": {"ffn": {"other": {"name": "gelu"}}}}, "llama", ""),  # which no layer uses
    ({"attention": {"name": "gqa", "head_dim": 6}, "overrides": [{"layers": 0, "attention": {"head_dim": 6}}]},
     "llama", ""),
    ({"init": {"std": 0.5, "depth_scaled": True}}, "llama", ""),
    ({**LATENT, "gating": BIAS}, "deepseek_v3", ""),  # what serves training only is no matter
    ({"position": INTERLEAVED}, "blockwright", "interleaved"),
    ({"position": {"name": "rope", "rotary_fraction": 0.34}}, "blockwright", "rotary_dim"),
    ({"overrides": [{"layers": 1, "position": {"theta": 7.0}}]}, "blockwright", "layers.1.attention.position.theta"),
    ({"position": {"name": "yarn", "pairing": "half_split"}}, "blockwright", "model.position.mscale_all_dim"),
    ({**EIGHT, "gating": {**TOP2, "renormalise": True}}, "mixtral", ""),
    ({**EIGHT, "gating": {"name": "topk_softmax", "top_k": 2}}, "mixtral", ""),
    *(({**EIGHT, "gating": {"name": name, "top_k": 2}}, "blockwright", "gating")
      for name in ("expert_choice", "sinkhorn", "group_limited", "hash")),
    ({"attention": {"name": "gqa", "n_heads": 10, "head_dim": 8}}, "mistral", ""),  # Llama's 48 is no multiple of 10
    ({**EIGHT, "attention": {**WHOLE, "head_dim": 12}}, "olmoe", ""),
    ({**EIGHT, "attention": WHOLE}, "blockwright", ""),
    ({**LATENT, "gating": {**TOP2, "renormalise": False}}, "deepseek_v2", ""),
    ({**LATENT, "gating": {**TOP2, "renormalise": True}}, "blockwright", ""),  # which the class ignores
]  # fmt: skip


@pytest.mark.parametrize(("changes", "family", "why"), EXPORTED, ids=range(len(EXPORTED)))
def test_compositions_are_recognised_by_what_they_build(
    changes: dict[str, Any], family: str, why: str, tiny: Tiny
) -> None:
    found, _, said = recognise(compose(tiny(**changes), device="meta"), None, {})
    assert found.model_type == family and why in str(said)
    assert (said is None) == (family != "blockwright")


def test_family_that_is_insisted_on_must_describe_the_model(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    path = saved(tiny())
    assert export_folder(path, tmp_path / "mistral", family="mistral") == ("mistral", None)
    for family in ("gpt2", "lama"):
        with pytest.raises(ConfigError):
            export_folder(path, tmp_path / "no", family=family)
    assert not (tmp_path / "no").exists()


def test_dtype_and_size_of_shards_are_the_ones_asked_for(
    saved: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    run = str(saved(tiny()))
    assert hf_export.main([run, str(tmp_path / "hf"), "--dtype", "bfloat16", "--max-shard-size", "20KB"]) == 0
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert index["weight_map"].keys() == tensors.keys() and len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(len(load_file(f)) == 1 or sum(t.nbytes for t in load_file(f).values()) <= 20_000 for f in files)
    wrong = [f"--max-shard-size={size}" for size in ("0", "big", "-5GB", "5 apples", "5")]
    for option in (*wrong, "--dtype=original", "--adapter"):  # it names no dtype, and holds no adapter
        assert hf_export.main([run, str(tmp_path / "no"), option]) == 64 and not (tmp_path / "no").exists()


def test_difference_is_none_for_the_same_and_names_what_differs(tiny: Tiny) -> None:
    one = compose(tiny(moe=True), device="meta")
    assert difference(one, compose(tiny(moe=True), device="meta")) is None
    other = compose(tiny(moe=True, gating={**TOP2, "scaling": 2.0}), device="meta")
    assert difference(one, other) == "layers.1.ffn.gating.scaling: 1.0 here, 2.0 there"


def test_family_of_another_kind_of_model_says_what_is_lacking(tiny: Tiny) -> None:
    """In words, whichever family is asked for."""
    for attention in ("gqa", "mla", "kda"):
        decoder = compose(tiny(attention={"name": attention}, residual={"name": "sandwich"}), device="meta")
        for family in FAMILIES:
            with pytest.raises(ConfigError) as found:
                recognise(decoder, family, {})
            said = found.value.rule
            assert not any(words in said for words in ("object has no attribute", "()", "NoneType", "argument")), said


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TRAINED_ON = [
    "To be, or not to be:\n\tthat is the question — naïve café! 0123\n\n" * 3,
    "日本語 and  double  blanks\r\n",
]
TEXTS = [
    *(*TRAINED_ON, "", " ", "\n\n  leading and trailing  \n", "To be   to be\tnot\n", "that's 2 questions, isn't it?"),
    "\u0000\u007f\u00a0\u2028𝔘𝔫𝔦 👩‍👩‍👧 é",  # decomposed accents are not to be composed
]
MAKERS: list[Callable[[], Tokenizer]] = [
    *(Bytes, lambda: Bytes(320), lambda: Chars(80), lambda: BPE(300)),
    lambda: BPE(600),  # with ids left over
]


@pytest.mark.parametrize("make", MAKERS, ids=range(len(MAKERS)))
def test_tokenizer_gives_transformers_the_same_ids_and_the_same_text_again(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    ours = make()
    ours.fit(TRAINED_ON)
    tokenizer.write(ours.to_json(), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text) == ids
        expected = ours.decode(ids)
        assert theirs.decode(ids) == (expected.replace("\ufffd", "<|unknown|>") if ours.kind == "chars" else expected)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eos == tokenizer.special(ours.to_json()).ends[0]
    assert theirs.decode([ours.eos], skip_special_tokens=True) == ""


def test_tokenizer_of_a_plug_in_has_no_such_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        tokenizer.write({"kind": "morse", "vocab_size": 9}, tmp_path)
    assert not list(tmp_path.iterdir())
