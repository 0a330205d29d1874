"""From a model configuration to a decoder, or to a refusal that says where, what, why and what instead."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from quickest import takes_less

from blockwright import registry
from blockwright.blocks import compose as module
from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.model_config import read
from blockwright.registry import ConfigError

TOKENS = torch.arange(21)[None] % 61


def refused(config: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose(config)
    error = caught.value
    assert error.path.startswith("model") and error.rule and error.remedy
    assert error.path in str(error) and error.rule in error.render() and error.remedy in error.render()
    return error


def names(decoder: Decoder, part: str) -> list[str]:
    return [type(getattr(layer, part)).__name__ for layer in decoder.layers]


# --- what is composed -------------------------------------------------------------------------------------------------


def test_yaml_mapping_and_omegaconf_compose_to_the_same(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True)
    logits = [
        compose(c)(TOKENS) for c in (config, OmegaConf.create(config), OmegaConf.to_yaml(OmegaConf.create(config)))
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_interpolations_are_resolved(tiny: Callable[..., Any]) -> None:
    decoder = compose(OmegaConf.create(tiny(ffn={"name": "swiglu", "d_ff": "${d_model}"})))
    assert decoder.layers[0].ffn.up.weight.shape == (48, 48)
    whole = OmegaConf.create({"data": {"size": 77}, "model": tiny(vocab_size="${data.size}")})
    assert compose(whole.model).embedding.weight.shape == (77, 48)


def test_bare_name_is_a_node_with_defaults(tiny: Callable[..., Any]) -> None:
    bare, spelt = compose(tiny(attention="gqa", ffn="swiglu")), compose(tiny(ffn={"name": "swiglu", "d_ff": None}))
    assert torch.equal(bare(TOKENS), spelt(TOKENS))


def test_decoder_carries_a_config_that_composes_to_an_equal_one(tiny: Callable[..., Any]) -> None:
    overrides = [{"layers": -1, "attention": "mla"}]
    for config in (tiny(), tiny(moe=True, overrides=overrides), tiny(position="learned", tie_embeddings=True)):
        decoder = compose(OmegaConf.create(config), seed=3)
        again = compose(decoder.config, seed=3)
        assert again.config == decoder.config
        assert torch.equal(again(TOKENS), decoder(TOKENS))


def test_config_is_complete_and_survives_a_checkpoint_without_trust(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True)
    del config["max_positions"], config["init"]
    decoder, buffer = compose(config), io.BytesIO()
    assert decoder.config["max_positions"] == 4096 and decoder.config["init"] == {"std": 0.006, "depth_scaled": False}
    torch.save({"config": decoder.config, "weights": decoder.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    rebuilt = compose(loaded["config"], seed=99)
    rebuilt.load_state_dict(loaded["weights"])
    assert torch.equal(rebuilt(TOKENS), decoder(TOKENS))


def test_input_is_left_as_it_was(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True, overrides=[{"layers": 0, "norm": {"eps": 1e-3}}])
    before = repr(config)
    compose(config)
    assert repr(config) == before


def test_meta_device_leaves_everything_unallocated(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(moe=True, gating="sigmoid_bias"), device="meta")
    assert all(t.is_meta for t in (*decoder.parameters(), *decoder.buffers()))
    assert {n: p.shape for n, p in decoder.state_dict().items()} == {
        n: p.shape for n, p in compose(decoder.config).state_dict().items()
    }


def test_nothing_is_left_on_the_meta_device_otherwise(tiny: Callable[..., Any]) -> None:
    for position in registry.names("position"):
        decoder = compose(tiny(moe=True, gating="sigmoid_bias", position=position))
        assert decoder(TOKENS).isfinite().all()
        assert not any(t.is_meta for t in (*decoder.parameters(), *decoder.buffers()))


# --- which layer gets what --------------------------------------------------------------------------------------------


def test_layout_variants_and_overrides_reach_their_layers(tiny: Callable[..., Any]) -> None:
    decoder = compose(
        tiny(
            moe=True,
            n_layers=6,
            layout={"ffn": "dense*1 ffn*", "attention": "attention*2 latent"},
            variants={
                "ffn": {"dense": {"name": "swiglu", "d_ff": 40}},
                "attention": {"latent": {"name": "mla", "kv_lora_rank": 11}},
            },
            overrides=[{"layers": "3..4", "ffn": {"name": "gelu", "d_ff": 9}}, {"layers": -1, "residual": "postnorm"}],
        )
    )
    assert names(decoder, "attention") == ["GQA", "GQA", "MLA"] * 2
    assert names(decoder, "ffn") == ["SwiGLU", "MoE", "MoE", "GELU", "GELU", "MoE"]
    assert names(decoder, "residual") == ["PreNorm"] * 5 + ["PostNorm"]
    assert decoder.layers[2].attention.latent == 11 and decoder.layers[3].ffn.up.weight.shape == (9, 48)
    decoder(TOKENS)


def test_position_may_change_from_layer_to_layer(tiny: Callable[..., Any]) -> None:
    decoder = compose(
        tiny(
            n_layers=4, layout={"position": "position*3 none"}, overrides=[{"layers": 1, "position": {"theta": 100.0}}]
        )
    )
    positions = [layer.attention.position for layer in decoder.layers]
    assert [type(p).__name__ for p in positions] == ["RoPE", "RoPE", "RoPE", "NoPosition"]
    assert [p.theta for p in positions[:3]] == [10000.0, 100.0, 10000.0]


def test_children_may_change_from_layer_to_layer(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True, n_layers=3, overrides=[{"layers": 2, "gating": {"top_k": 3}, "experts": {"d_ff": 8}}])
    decoder = compose(config)
    assert decoder.layers[1].ffn.gating.top_k == 2 and decoder.layers[2].ffn.gating.top_k == 3
    assert decoder.layers[2].ffn.experts.down.shape == (6, 48, 8)
    assert decoder.layers[2].ffn.gating.balance[0].alpha == 0.01


def test_child_reaches_the_layers_that_take_it(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(layout={"attention": "attention mla"}, qk_norm="per_head"))
    assert decoder.layers[0].attention.qk_norm is not None and names(decoder, "attention") == ["GQA", "MLA"]


def test_choice_is_held_ready_for_a_block_that_cannot_do_without(tiny: Callable[..., Any]) -> None:
    """So a dense ffn may be swapped into a mixture, and back, with nothing else changed."""
    config = tiny(moe=True, ffn="swiglu", layout=None)
    assert names(compose(config), "ffn") == ["SwiGLU", "SwiGLU"] and "gating" in config and "experts" in config


def test_child_node_without_a_name_patches_the_outer_node(tiny: Callable[..., Any]) -> None:
    attention = {"name": "gqa", "position": {"theta": 5.0}}
    decoder = compose(tiny(attention=attention, position={"name": "rope", "pairing": "interleaved"}))
    position = decoder.layers[0].attention.position
    assert position.theta == 5.0 and position.interleaved


def test_patch_of_a_child_reaches_into_its_own_children(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True)
    config["ffn"]["gating"] = {"balance": {"alpha": 0.5}}
    gating = compose(config).layers[1].ffn.gating
    assert gating.balance[0].alpha == 0.5 and gating.top_k == 2


def test_child_with_a_name_replaces_the_outer_node(tiny: Callable[..., Any]) -> None:
    decoder = compose(
        tiny(attention={"name": "gqa", "position": "alibi"}, residual={"name": "prenorm", "ffn_norm": "layernorm"})
    )
    assert type(decoder.layers[0].attention.position).__name__ == "ALiBi"
    assert type(decoder.layers[0].residual.ffn_norm).__name__ == "LayerNorm"
    assert type(decoder.layers[0].residual.attention_norm).__name__ == type(decoder.norm).__name__ == "RMSNorm"


def test_latent_norms_are_the_models_unless_named(tiny: Callable[..., Any]) -> None:
    mla = {"name": "mla", "kv_norm": {"name": "rmsnorm", "eps": 1e-6}}
    decoder = compose(tiny(attention=mla, norm={"name": "rmsnorm", "eps": 1e-5}))
    assert decoder.layers[0].attention.kv_norm.eps == 1e-6 and decoder.norm.eps == 1e-5


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_embedding_positions_are_built_once_and_attentions_get_none(tiny: Callable[..., Any], name: str) -> None:
    decoder = compose(tiny(position=name))
    found = [type(m).__name__ for m in decoder.modules() if isinstance(m, module.Position)]
    assert found == [type(decoder.position).__name__, "NoPosition", "NoPosition"]
    assert type(decoder.position).__name__ == {"learned": "Learned", "sinusoidal": "Sinusoidal"}[name]


@pytest.mark.parametrize("name", ["rope", "alibi", "yarn", "none"])
def test_attention_positions_leave_the_embeddings_alone(tiny: Callable[..., Any], name: str) -> None:
    decoder = compose(tiny(position=name))
    assert type(decoder.position).__name__ == "NoPosition"
    assert len({id(layer.attention.position) for layer in decoder.layers}) == 2


def test_layer_may_turn_where_the_model_adds(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(position="learned", overrides=[{"layers": 1, "position": "rope"}]))
    assert [type(layer.attention.position).__name__ for layer in decoder.layers] == ["NoPosition", "RoPE"]
    assert type(decoder.position).__name__ == "Learned"


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: {"overrides": [{"layers": 1, "position": name}]},
        lambda name: {"layout": {"position": f"position {name}"}},
        lambda name: {"attention": {"name": "gqa", "position": name}},
        lambda name: {"overrides": [{"layers": 1, "attention": {"position": {"name": name}}}]},
    ],
    ids=["override", "layout", "attention's own", "override of the attention's own"],
)
def test_layer_cannot_have_a_position_that_works_on_the_embeddings(
    tiny: Callable[..., Any], change: Callable[[str], dict[str, Any]], name: str
) -> None:
    """Built there, its hook would never be called: an ablation of nothing."""
    error = refused(tiny(**change(name)))
    assert "position" in error.path and "model.position" in error.remedy


# --- refusals ---------------------------------------------------------------------------------------------------------

MLA = {"name": "mla"}
REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"d_modell": 3}, "model.d_modell", "'d_model'"),
    ({"attentoin": "gqa"}, "model.attentoin", "'attention'"),
    ({"d_model": "48"}, "model.d_model", "model.d_model="),
    ({"d_model": 48.0}, "model.d_model", "model.d_model="),
    ({"d_model": True}, "model.d_model", "model.d_model="),
    ({"d_model": None}, "model.d_model", "model.d_model="),
    ({"d_model": "???"}, "model.d_model", "model.d_model="),
    ({"d_model": 0}, "model.d_model", "=1"),
    ({"d_model": -48}, "model.d_model", "=1"),
    ({"vocab_size": 0}, "model.vocab_size", "=1"),
    ({"n_layers": 0}, "model.n_layers", "=1"),
    ({"n_layers": 10**9}, "model.n_layers", "layers"),
    ({"max_positions": 0}, "model.max_positions", "=1"),
    ({"tie_embeddings": "yes"}, "model.tie_embeddings", "model.tie_embeddings="),
    ({"tie_embeddings": 1}, "model.tie_embeddings", "model.tie_embeddings="),
    ({"init": None}, "model.init", "std"),
    ({"init": {"sd": 0.1}}, "model.init.sd", "'std'"),
    ({"init": {"std": "small"}}, "model.init.std", "0.006"),
    ({"init": {"std": -0.1}}, "model.init.std", "0.006"),
    ({"init": {"std": float("nan")}}, "model.init.std", "0.006"),
    ({"init": {"std": float("inf")}}, "model.init.std", "0.006"),
    ({"init": {"depth_scaled": 1}}, "model.init.depth_scaled", "model.init.depth_scaled="),
    ({"attention": None}, "model.attention", "+model/attention="),
    ({"ffn": None}, "model.ffn", "+model/ffn="),
    ({"norm": None}, "model.norm", "+model/norm="),
    ({"residual": None}, "model.residual", "+model/residual="),
    ({"position": None}, "model.position", "+model/position="),
    ({"attention": "gqqa"}, "model.attention.name", "'gqa'"),
    ({"attention": {"name": "swiglu"}}, "model.attention.name", "gqa, grouped_tied, kda"),
    ({"attention": {"name": None}}, "model.attention.name", "gqa, grouped_tied, kda"),
    ({"attention": {"name": ["gqa"]}}, "model.attention.name", "gqa, grouped_tied, kda"),
    ({"attention": {"n_heads": 8}}, "model.attention", "gqa, grouped_tied, kda"),
    ({"attention": ["gqa"]}, "model.attention", "gqa, grouped_tied, kda"),
    ({"attention": 5}, "model.attention", "gqa, grouped_tied, kda"),
    ({"attention": {"name": "gqa", "n_head": 8}}, "model.attention.n_head", "'n_heads'"),
    ({"attention": {"name": "gqa", "d_model": 8}}, "model.attention.d_model", "n_heads"),
    ({"attention": {"name": "gqa", "layer_idx": 8}}, "model.attention.layer_idx", "n_heads"),
    ({"attention": {"name": "gqa", "n_heads": "8"}}, "model.attention.n_heads", "int"),
    ({"attention": {"name": "gqa", "n_heads": 8.0}}, "model.attention.n_heads", "int"),
    ({"attention": {"name": "gqa", "bias": "no"}}, "model.attention.bias", "bool"),
    ({"attention": {"name": "gqa", "bias": 0}}, "model.attention.bias", "bool"),
    ({"attention": {"name": "gqa", "n_heads": 7}}, "model.attention.n_heads", "nearest"),
    ({"attention": {"name": "gqa", "position": {"thetta": 1}}}, "model.attention.position.thetta", "'theta'"),
    ({"attention": {"name": "gqa", "position": 7}}, "model.attention.position", "rope"),
    ({"position": {"name": "rope", "pairing": "half"}}, "model.position.pairing", "Literal"),
    ({"position": {"name": "none", "theta": 1}}, "model.position.theta", "no parameters"),
    ({"residual": {"name": "prenorm", "ffn_norm": {"epss": 1}}}, "model.residual.ffn_norm.epss", "'eps'"),
    ({"ffn": "moe"}, "model.gating", "+model/gating="),
    ({"ffn": "moe", "gating": "softmax_topk"}, "model.experts", "+model/experts="),
    (
        {"ffn": "moe", "gating": "softmax_topk", "experts": "swiglu"},
        "model.experts.d_ff",
        "model.experts.d_ff=<int ≥ 1>",
    ),
    ({"gating": {"name": "softmax_topk", "topk": 2}}, "model.gating.topk", "'top_k'"),  # even where no layer uses it
    ({"attention": "mla", "qk_norm": "per_head"}, "model.qk_norm", "|gqa|"),
    ({"attention": "mla", "scores": {"name": "softcap", "cap": 3.0}}, "model.scores", "model.scores=null"),
    ({"attention": {"name": "gqa", "scores": "sinks"}, "scores": "softcap"}, "model.scores", "|gqa|"),
    ({"dropping": "device_budget"}, "model.dropping", "ffn moe"),
    ({"balance": "expert"}, "model.balance", "gating "),
    ({"overrides": [{"layers": 1, "attention": "mla", "qk_norm": "full"}]}, "model.qk_norm (layer 1)", "|gqa|"),
    ({"layout": {"ffnn": "ffn"}}, "model.layout.ffnn", "'ffn'"),
    ({"layout": {"ffn": "ffn swoglu"}}, "model.layout.ffn", "'swiglu'"),
    ({"layout": "ffn"}, "model.layout", "leave out model.layout"),
    ({"variants": {"ffn": {"wide": {"name": "swiglu", "dff": 3}}}}, "model.variants.ffn.wide.dff", "'d_ff'"),
    ({"variants": {"ffn": {"wide": {"dff": 3}}}}, "model.variants.ffn.wide.dff", "'d_ff'"),
    ({"variants": {"ffn": {"wide": "swoglu"}}}, "model.variants.ffn.wide.name", "'swiglu'"),
    (
        {"variants": {"attention": {"full": {"window": None}}}, "layout": {"attention": "attention full"}},
        "model.variants.attention.full.window",
        "model.layout.attention=null model.variants.attention=null",
    ),
    ({"overrides": {"layers": 0}}, "model.overrides", "leave out model.overrides"),
    ({"overrides": [{"layers": 5, "ffn": "gelu"}]}, "model.overrides.0.layers", "0 to 1"),
    ({"overrides": [{"layers": 1, "ffn": {"dff": 3}}]}, "model.ffn (layer 1).dff", "'d_ff'"),
    ({"vocab_size": 10**30}, "model.vocab_size", "smaller"),
    ({"vocab_size": 10**12, "d_model": 48 * 10**9}, "model.vocab_size", "smaller"),
    ({"d_model": 48 * 10**10}, "model.attention", "Lower its widths"),
    ({"max_positions": 10**18}, "model.max_positions", "smaller"),
    ({"max_positions": 10**13, "position": "learned"}, "model", "Lower its widths"),
]


@pytest.mark.parametrize(("change", "path", "remedy"), REFUSALS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_mistake_is_refused_at_its_path_with_a_remedy(
    tiny: Callable[..., Any], change: dict[str, Any], path: str, remedy: str
) -> None:
    error = refused({**tiny(), **change})
    assert error.path == path
    assert remedy in error.remedy


@pytest.mark.parametrize("key", ["vocab_size", "d_model", "n_layers"])
def test_missing_size_is_asked_for(tiny: Callable[..., Any], key: str) -> None:
    config = tiny()
    del config[key]
    assert refused(config).path == f"model.{key}"


@pytest.mark.parametrize(
    "place",
    [
        lambda c, t: c.update(t),
        lambda c, t: c["attention"].update(t),
        lambda c, t: c["ffn"].update(shared={"name": "swiglu", **t}),
        lambda c, t: c["gating"].update(balance=t),
        lambda c, t: c["init"].update(t),
        lambda c, t: c.update(layout={"ffn": t}),
        lambda c, t: c.update(variants={"ffn": {"x": {"deep": [{"er": t}]}}}),
        lambda c, t: c.update(overrides=[{"layers": 0, "ffn": t}]),
    ],
    ids=["model", "block", "child", "grandchild", "init", "layout", "variant", "override"],
)
@pytest.mark.parametrize("key", ["_target_", "_partial_", "_args_", "_convert_", "_recursive_"])
def test_dotted_path_is_refused_wherever_it_stands(
    tiny: Callable[..., Any], key: str, place: Callable[[dict, dict], None]
) -> None:
    config = tiny(moe=True)
    place(config, {key: "os.system", "command": "true"})
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
    with pytest.raises(ConfigError) as caught:
        compose(config)
    assert caught.value.path and caught.value.rule and caught.value.remedy


def test_refusal_comes_before_any_memory_and_within_a_second(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_huge_valid_model_is_checked_without_memory(tiny: Callable[..., Any]) -> None:
    config = check(tiny(moe=True, d_model=8 * 2**16, vocab_size=10**6, n_layers=50))
    assert config["n_layers"] == 50


def test_reading_builds_nothing(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "build", lambda *_: pytest.fail("built"))
    assert read(tiny(attention={"name": "gqa", "n_heads": 7}))["attention"]["n_heads"] == 7  # judged when it is built


def test_mixture_in_a_mixture_is_refused(tiny: Callable[..., Any]) -> None:
    config = tiny(moe=True)
    config["ffn"]["shared"] = {"name": "moe"}
    error = refused(config)
    assert error.path == "model.ffn.shared" and "contain itself" in error.rule


def test_state_of_one_composition_loads_in_another_and_not_in_a_different_one(tiny: Callable[..., Any]) -> None:
    one, other = compose(tiny(moe=True), seed=1), compose(tiny(moe=True), seed=2)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(TOKENS), other(TOKENS))
    with pytest.raises(RuntimeError, match="Missing key"):
        compose(tiny(moe=True, attention="mla")).load_state_dict(one.state_dict())


def test_construction_under_grad_and_no_grad_is_alike(tiny: Callable[..., Any]) -> None:
    with torch.no_grad():
        decoder = compose(tiny(moe=True))
    assert all(p.requires_grad and p.is_leaf for p in decoder.parameters())
    assert all(p.requires_grad and p.is_leaf for p in compose(tiny(moe=True)).parameters())


@pytest.mark.parametrize("word", ["tiny", "conf/preset/tiny.yaml"])
def test_name_of_a_preset_or_a_file_in_place_of_a_model_is_told_apart(word: str) -> None:
    with pytest.raises(ConfigError, match=r"preset\(NAME\)"):
        compose(word)
