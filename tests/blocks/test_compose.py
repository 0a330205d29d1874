"""From a model configuration to a decoder, or to a refusal; refusals of single values are in test_refusals.py."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from quickest import takes_less

from blockwright import registry
from blockwright.blocks.compose import check, compose, read
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.position.base import Position
from blockwright.registry import ConfigError
from tests.blocks.small import Make

TOKENS = torch.arange(21)[None] % 61


def refused(config: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose(config)
    error = caught.value
    assert error.path and error.rule and error.remedy
    assert error.path in str(error) and error.rule in error.render() and error.remedy in error.render()
    return error


def names(decoder: Decoder, part: str) -> list[str]:
    return [type(getattr(layer, part)).__name__ for layer in decoder.layers]


def test_yaml_mapping_omegaconf_and_interpolations_compose_to_the_same_and_are_left_as_they_were(tiny: Make) -> None:
    config = tiny(moe=True, overrides=[{"layers": 0, "norm": {"eps": 1e-3}}])
    node, before = OmegaConf.create(config), repr(config)
    one, *others = (compose(c)(TOKENS) for c in (config, node, OmegaConf.to_yaml(node)))
    assert repr(config) == before and all(torch.equal(one, other) for other in others)
    decoder = compose(OmegaConf.create(tiny(ffn={"name": "swiglu", "d_ff": "${d_model}"})))
    assert decoder.layers[0].ffn.up.weight.shape == (48, 48)
    whole = OmegaConf.create({"data": {"size": 77}, "model": tiny(vocab_size="${data.size}")})
    assert compose(whole.model).embedding.weight.shape == (77, 48)


def test_bare_name_is_a_node_with_defaults(tiny: Make) -> None:
    bare, spelt = compose(tiny(attention="gqa", ffn="swiglu")), compose(tiny(ffn={"name": "swiglu", "d_ff": None}))
    assert torch.equal(bare(TOKENS), spelt(TOKENS))


def test_config_of_a_decoder_is_complete_and_composes_to_an_equal_one_from_a_checkpoint(tiny: Make) -> None:
    overridden = tiny(moe=True, overrides=[{"layers": -1, "attention": "mla"}])
    del overridden["max_positions"], overridden["init"]
    for config in (overridden, tiny(position="learned", tie_embeddings=True)):
        decoder, buffer = compose(OmegaConf.create(config), seed=3), io.BytesIO()
        torch.save({"config": decoder.config, "weights": decoder.state_dict()}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        again, other = (compose(loaded["config"], seed=seed) for seed in (3, 99))
        other.load_state_dict(loaded["weights"])
        assert again.config == decoder.config
        assert all(torch.equal(made(TOKENS), decoder(TOKENS)) for made in (again, other))
    config = compose(overridden, device="meta").config
    assert config["max_positions"] == 4096 and config["init"] == {"std": 0.006, "depth_scaled": False}


def test_meta_device_leaves_everything_unallocated_and_others_nothing(tiny: Make) -> None:
    for position in registry.names("position"):
        config = tiny(moe=True, gating="sigmoid_bias", position=position)
        decoder, ghost = compose(config), compose(config, device="meta")
        assert decoder(TOKENS).isfinite().all(), position
        assert not any(t.is_meta for t in (*decoder.parameters(), *decoder.buffers())), position
        assert all(t.is_meta for t in (*ghost.parameters(), *ghost.buffers()))
        shapes = [{n: p.shape for n, p in made.state_dict().items()} for made in (decoder, ghost)]
        assert shapes[0] == shapes[1]


def test_state_of_one_composition_loads_in_another_and_not_in_a_different_one(tiny: Make) -> None:
    with torch.no_grad():
        one, other = compose(tiny(moe=True), seed=1), compose(tiny(moe=True), seed=2)
    assert all(p.requires_grad and p.is_leaf for p in one.parameters())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(TOKENS), other(TOKENS))
    with pytest.raises(RuntimeError, match="Missing key"):
        compose(tiny(moe=True, attention="mla")).load_state_dict(one.state_dict())


def test_layout_variants_and_overrides_reach_their_layers_and_the_children_there(tiny: Make) -> None:
    variants = {"ffn": {"dense": {"name": "swiglu", "d_ff": 40}}}
    variants |= {"attention": {"latent": {"name": "mla", "kv_lora_rank": 11}}}
    overrides: list[dict[str, Any]] = [{"layers": "3..4", "ffn": {"name": "gelu", "d_ff": 9}}]
    overrides += [{"layers": -1, "residual": "postnorm", "gating": {"top_k": 3}, "experts": {"d_ff": 8}}]
    layout = {"ffn": "dense*1 ffn*", "attention": "attention*2 latent"}
    config = tiny(moe=True, n_layers=6, layout=layout, variants=variants, overrides=overrides, qk_norm="per_head")
    decoder: Any = compose(config)
    assert names(decoder, "attention") == ["GQA", "GQA", "MLA"] * 2
    assert names(decoder, "ffn") == ["SwiGLU", "MoE", "MoE", "GELU", "GELU", "MoE"]
    assert names(decoder, "residual") == ["PreNorm"] * 5 + ["PostNorm"]
    assert decoder.layers[2].attention.latent == 11 and decoder.layers[3].ffn.up.weight.shape == (9, 48)
    assert decoder.layers[1].ffn.gating.top_k == 2 and decoder.layers[5].ffn.gating.top_k == 3
    assert decoder.layers[5].ffn.experts.down.shape == (6, 48, 8)
    assert decoder.layers[5].ffn.gating.balance[0].alpha == 0.01
    assert decoder.layers[0].attention.qk_norm is not None  # a child reaches the layers that take it
    decoder(TOKENS)


def test_choice_is_held_ready_for_a_block_that_cannot_do_without(tiny: Make) -> None:
    """So a dense ffn may be swapped into a mixture, and back, with nothing else changed."""
    config = tiny(moe=True, ffn="swiglu", layout=None)
    assert names(compose(config), "ffn") == ["SwiGLU", "SwiGLU"] and "gating" in config and "experts" in config


def test_child_without_a_name_patches_the_outer_node_and_one_with_replaces_it(tiny: Make) -> None:
    attention = {"name": "gqa", "position": {"theta": 5.0}}
    decoder: Any = compose(tiny(attention=attention, position={"name": "rope", "pairing": "interleaved"}))
    assert decoder.layers[0].attention.position.theta == 5.0 and decoder.layers[0].attention.position.interleaved
    config = tiny(moe=True, residual={"name": "prenorm", "ffn_norm": "layernorm"})
    config["ffn"]["gating"] = {"balance": {"alpha": 0.5}}  # into its own children too
    config["attention"] = {"name": "mla", "position": "alibi", "kv_norm": {"name": "rmsnorm", "eps": 1e-5}}
    layer: Any = compose(config).layers[1]
    assert layer.ffn.gating.balance[0].alpha == 0.5 and layer.ffn.gating.top_k == 2
    assert type(layer.attention.position).__name__ == "ALiBi"
    assert type(layer.residual.ffn_norm).__name__ == "LayerNorm"
    assert layer.residual.attention_norm.eps == 1e-6 and layer.attention.kv_norm.eps == 1e-5


def test_positions_are_of_the_embeddings_once_or_of_each_attention(tiny: Make) -> None:
    for name in ("learned", "sinusoidal"):
        decoder = compose(tiny(position=name))
        found = [type(m).__name__ for m in decoder.modules() if isinstance(m, Position)]
        assert found == [name.capitalize(), "NoPosition", "NoPosition"]
        assert type(decoder.position).__name__ == name.capitalize()
    for name in ("rope", "alibi", "yarn", "none"):
        decoder = compose(tiny(position=name))
        assert type(decoder.position).__name__ == "NoPosition"
        assert len({id(layer.attention.position) for layer in decoder.layers}) == 2
    changed = [{"layers": 1, "position": {"theta": 100.0}}]
    decoder = compose(tiny(n_layers=4, layout={"position": "position*3 none"}, overrides=changed))
    positions: list[Any] = [layer.attention.position for layer in decoder.layers]
    assert [type(p).__name__ for p in positions] == ["RoPE", "RoPE", "RoPE", "NoPosition"]
    assert [p.theta for p in positions[:3]] == [10000.0, 100.0, 10000.0]
    decoder = compose(tiny(position="learned", overrides=[{"layers": 1, "position": "rope"}]))
    assert [type(layer.attention.position).__name__ for layer in decoder.layers] == ["NoPosition", "RoPE"]
    assert type(decoder.position).__name__ == "Learned"


PLACES: dict[str, Callable[[dict, dict], Any]] = {
    "model": lambda c, t: c.update(t),
    "block": lambda c, t: c["attention"].update(t),
    "child": lambda c, t: c["ffn"].update(shared={"name": "swiglu", **t}),
    "grandchild": lambda c, t: c["gating"].update(balance=t),
    "init": lambda c, t: c["init"].update(t),
    "layout": lambda c, t: c.update(layout={"ffn": t}),
    "variant": lambda c, t: c.update(variants={"ffn": {"x": {"deep": [{"er": t}]}}}),
    "override": lambda c, t: c.update(overrides=[{"layers": 0, "ffn": t}]),
}


@pytest.mark.parametrize("place", PLACES)
def test_dotted_path_is_refused_wherever_it_stands(tiny: Make, place: str) -> None:
    for key in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_"):
        config = tiny(moe=True)
        PLACES[place](config, {key: "os.system", "command": "true"})
        error = refused(config)
        assert error.path.endswith(f".{key}") and "blockwright blocks" in error.remedy


@pytest.mark.parametrize(
    "config",
    [
        "a: [", "*x", "\x00", "5", "[1]", "just text", "", "a: !!python/object/apply:os.system ['true']",
        5, None, [1], {1: 2}, {None: 2}, {"attention": object()}, {"attention": {1, 2}}, {"d_model": "${nowhere}"},
        {"d_model": "${d_model}"}, {"d_model": "${nosuch:1}"}, b"x",
    ],
    ids=lambda value: repr(value).split(" at 0x")[0],
)  # fmt: skip
def test_what_is_no_model_at_all_is_refused(config: Any) -> None:
    refused(config)


def test_name_of_a_preset_or_a_file_in_place_of_a_model_is_told_apart() -> None:
    for word in ("tiny", "conf/preset/tiny.yaml"):
        assert "preset(NAME)" in str(refused(word))


def test_missing_size_is_asked_for(tiny: Make) -> None:
    for key in ("vocab_size", "d_model", "n_layers"):
        config = tiny()
        del config[key]
        assert refused(config).path == f"model.{key}"


def test_refusal_comes_before_any_memory_and_within_a_second(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(Decoder, "to_empty", forbidden)
    huge = tiny(moe=True, d_model=8 * 2**16, vocab_size=10**6, n_layers=8)  # 1.4e12 parameters
    registry.load()
    for mistake in (
        {"overrides": [{"layers": 7, "attention": {"n_heads": 7}}]},
        {"overrides": [{"layers": 7, "gating": {"top_k": 9}}]},
        {"overrides": [{"layers": 7, "position": {"thetta": 1.0}}]},
        {"d_model": 8 * 10**9 + 1},
    ):
        assert takes_less(1, lambda mistake=mistake: refused({**huge, **mistake}))
    assert check({**huge, "n_layers": 50})["n_layers"] == 50


def test_reading_builds_nothing(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "build", lambda *_: pytest.fail("built"))
    assert read(tiny(attention={"name": "gqa", "n_heads": 7}))["attention"]["n_heads"] == 7  # judged when it is built


VALID: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 16,
    "n_layers": 2,
    "max_positions": 8,
    "tie_embeddings": False,
    "init": {"std": 0.02, "depth_scaled": False},
    "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "position": {"theta": 100.0}},
    "position": {"name": "rope"},
    "ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 8}},
    "gating": {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert"}},
    "experts": {"name": "swiglu", "d_ff": 8},
    "norm": {"name": "rmsnorm", "eps": 1e-6},
    "residual": {"name": "prenorm", "ffn_norm": {"eps": 1e-5}},
    "variants": {"ffn": {"dense": {"name": "gelu"}}},
    "layout": {"ffn": "dense*1 ffn*"},
    "overrides": [{"layers": 1, "attention": {"name": "mla", "n_heads": 4}}],
}
WORDS = ["name", "theta", "d_ff", "n_heads", "top_k", "position", "norm", "layers", "_target_", "dense", "x"]
TEXTS = ["gqa", "mla", "moe", "swiglu", "rope", "alibi", "learned", "yarn", "layernorm", "sandwich", "group_limited"]
TEXTS += [
    "sigmoid_bias",
    "none",
    "dense*1 ffn*",
    "ffn",
    "0..1",
    "-1",
    "???",
    "${d_model}",
    "${nowhere}",
    "",
    "half_split",
]
NUMBERS = st.integers(-3, 9) | st.sampled_from([10**6, 10**12, 2**63, 10**40, -(10**12)]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(TEXTS) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [p for key, inner in items for p in places(inner, (*path, key))]


@st.composite
def mutants(draw: st.DrawFn) -> dict[str, Any]:
    model = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(model)))
        at: Any = model
        for key in path[:-1]:
            at = at[key]
        change = draw(st.sampled_from(["replace", "drop", "add", "rename"]))
        if change == "replace":
            at[path[-1]] = draw(VALUES)
        elif change == "drop":
            del at[path[-1]]
        elif isinstance(at, dict):
            key = draw(st.sampled_from(WORDS) | st.text(max_size=3) | st.integers())
            at[key] = draw(VALUES) if change == "add" else at.pop(path[-1])
        if not model:
            break
    return model


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@example(VALID)
@example({**VALID, "vocab_size": 10**40})
@example({**VALID, "d_model": 2**62})
@example({**VALID, "n_layers": 10**40})
@example({**VALID, "gating": {"name": "group_limited", "n_groups": 2**63}})
@given(mutants())
def test_any_mutant_composes_or_is_refused_and_nothing_else(model: dict[str, Any]) -> None:
    try:
        decoder = compose(model, device="meta")
    except ConfigError as error:
        assert model != VALID and error.path and error.rule and error.remedy
        assert str(error) and error.render()
    else:
        assert all(p.is_meta for p in decoder.parameters())
        compose(decoder.config, device="meta")
        if decoder.config["vocab_size"] < 10**6 > decoder.config["d_model"]:
            logits = decoder(torch.zeros(1, 5, dtype=torch.long, device="meta"))  # what composes runs
            assert logits.shape == (1, 5, decoder.config["vocab_size"])
