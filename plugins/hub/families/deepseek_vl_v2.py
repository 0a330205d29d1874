"""DeepSeek-VL2: a SigLIP tower, a projector and a DeepSeek language model, each with a configuration of its own.

The language model is that of ``deepseek`` (tiny) or ``deepseek_v2`` (small, base). The pooling head of the tower, which
the released code never runs, is left out. transformers has no class for the whole.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Part, Unused, refusal, show
from blockwright.plugins.hub.deepseek_like import NAMES
from blockwright.plugins.hub.families.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3
from blockwright.plugins.hub.family import Family, inside
from blockwright.plugins.hub.llama_like import ATTENTION, TABLES
from blockwright.plugins.hub.names import PATCHES, UNBATCHED, Row, one_of

MODEL_TYPE = "deepseek_vl_v2"

# ---- names -----------------------------------------------------------------------------------------------------------

OURS, BLOCK = "images.vision.layers.{i}.", "vision.blocks.{i}."
TOWER = (  # timm's
    Row("images.vision.patches.project.weight", "vision.patch_embed.proj.weight", form=PATCHES),
    Row("images.vision.patches.project.bias", "vision.patch_embed.proj.bias"),
    Row("images.vision.patches.position.weight", "vision.pos_embed", form=UNBATCHED),
    *(
        Row(f"{OURS}attention.{name}.*", f"{BLOCK}attn.qkv.*", form=one_of(3, n))
        for n, name in enumerate(("query", "key", "value"))
    ),
    Row(f"{OURS}attention.output.*", f"{BLOCK}attn.proj.*"),
    Row(f"{OURS}attention_norm.*", f"{BLOCK}norm1.*"),
    Row(f"{OURS}ffn_norm.*", f"{BLOCK}norm2.*"),
    Row(f"{OURS}ffn.up.*", f"{BLOCK}mlp.fc1.*"),
    Row(f"{OURS}ffn.down.*", f"{BLOCK}mlp.fc2.*"),
    Row("images.vision.norm.*", "vision.norm.*"),
)
BETWEEN = (
    *(Row(f"images.projector.layers.{n}.*", f"projector.layers.{2 * n}.*") for n in range(4)),  # GELUs in between
    Row("images.tiling.newline.weight", "image_newline"),
    Row("images.tiling.separator.weight", "view_seperator"),
)
LANGUAGE = tuple(
    Row(row.ours, f"language.{row.theirs}" if row.theirs else "", row.part, row.form)
    for row in (*NAMES, *ATTENTION[1:3])
)

# ---- settings --------------------------------------------------------------------------------------------------------

# What the released classes take where config.json has no such key.
VISION = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0}
PROJECTOR = {"input_dim": 1152, "depth": 2, "mlp_ratio": 1, "downsample_ratio": 2}
HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
IMAGE_TOKEN = {129280: 128815, 102400: 100003}  # by the size of the vocabulary


def _read_language(config: Config, model: dict[str, Any]) -> None:
    values = {"rms_norm_eps": 1e-6, **config.values}
    if not values.pop("lm_head", True):
        raise refusal("lm_head", False, "must be true: a model without a head is not supported", "Use one with a head")
    latent = values.get("use_mla", True)
    family, values = (DEEPSEEK_V2, {**HEADS, **values}) if latent else (DEEPSEEK, values)
    model |= family.composition(values, config.mtp, config.ignored)
    config.taken |= config.values.keys()  # the family has refused what it does not read


def _write_language(decoder: Decoder, config: dict[str, Any]) -> None:
    text = copy.copy(decoder)
    text._modules = {**decoder._modules, "images": None}
    for family in (DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3):
        try:
            values = family.config(text)
        except LookupError as error:
            reason = str(error)
            continue
        values |= {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
        unknown = ("rope_interleave", "num_nextn_predict_layers")  # to the released class
        values = {key: value for key, value in values.items() if key not in unknown}
        config["language_config"] = {**values, "use_mla": family is not DEEPSEEK}
        return
    raise AttributeError(reason)


def _read_vision(config: Config, model: dict[str, Any]) -> None:
    found = {key: config.take(key, kind=type(value), default=value) for key, value in VISION.items()}
    for setting in (Fixed("global_pool", "map"), Fixed("class_token", False), Fixed("ignore_head", True)):
        setting.read(config, model)
    for key in ("model_name", "num_classes", "use_checkpoint", "weight_init", "deterministic"):
        Unused(key).read(config, model)
    ffn = {"name": "gelu", "d_ff": int(found["width"] * found["mlp_ratio"]), "bias": True, "approximate": "tanh"}
    model["vision"] = {
        "name": "siglip",
        **{ours: found[theirs] for ours, theirs in SIZES.items()},
        "norm": {"name": "layernorm", "eps": 1e-6},
        "ffn": ffn,
    }


SIZES = {"tile": "image_size", "patch": "patch_size", "width": "width", "depth": "layers", "n_heads": "heads"}


def _write_vision(decoder: Decoder, config: dict[str, Any]) -> None:
    tower: Any = show(decoder, "images.vision")
    layer = tower.layers[0]
    width, ratio = tower.width, 3.7362  # of SO400M
    if int(width * ratio) != layer.ffn.up.out_features:
        ratio = layer.ffn.up.out_features / width
        ratio = ratio if int(width * ratio) == layer.ffn.up.out_features else math.nextafter(ratio, math.inf)
    config["vision_config"] = {
        "model_type": "vision",
        "model_name": "siglip_so400m_patch14_384",
        "image_size": tower.tile,
        "patch_size": tower.patches.patch,
        "width": width,
        "layers": len(tower.layers),
        "heads": width // layer.attention.head_dim,
        "mlp_ratio": ratio,
    }


def _read_projector(config: Config, model: dict[str, Any]) -> None:
    found = {key: config.take(key, kind=int, default=value) for key, value in PROJECTOR.items()}
    for setting in (Fixed("projector_type", "downsample_mlp_gelu"), Fixed("token_pooling", False)):
        setting.read(config, model)
    for key, value, other in (("input_dim", found["input_dim"], model["vision"]["width"]),
                              ("n_embed", config.take("n_embed", kind=int), model["d_model"])):  # fmt: skip
        if value != other:
            raise refusal(key, value, f"must be the width that it joins, {other}", "Use a config.json of one model")
    model["projector"] = {
        "name": "downsample_mlp",
        "ratio": found["downsample_ratio"],
        "depth": found["depth"],
        "mlp_ratio": found["mlp_ratio"],
    }


def _write_projector(decoder: Decoder, config: dict[str, Any]) -> None:
    projector, layers = show(decoder, "images.projector"), show(decoder, "images.projector.layers")
    d_model = layers[-1].out_features
    config["projector_config"] = {
        "model_type": "mlp_projector",
        "projector_type": "downsample_mlp_gelu",
        "input_dim": show(decoder, "images.vision.width"),
        "n_embed": d_model,
        "depth": len(layers),
        "mlp_ratio": layers[0].out_features // d_model,
        "downsample_ratio": projector.ratio,
    }


def _read_tiling(config: Config, model: dict[str, Any]) -> None:
    tile, given = model["vision"]["tile"], config.take("candidate_resolutions", kind=list)
    try:
        grids = {(width / tile, height / tile) for width, height in given}
        most = int(max(c * r for c, r in grids))
    except (TypeError, ValueError):
        raise refusal("candidate_resolutions", given, "must list pairs of numbers", "Correct config.json") from None
    if grids != {(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)}:
        rule = f"must be all grids of at most {most} tiles of {tile} pixels"
        raise refusal("candidate_resolutions", given, rule, "Other lists of candidates are not supported")
    Fixed("tile_tag", "2D").read(config, model)
    place = config.take("global_view_pos", default="head")
    model["tiling"] = {"name": "grid_2d", "max_tiles": most, "global_view": place}
    token = config.take("image_token_id", kind=int, default=IMAGE_TOKEN.get(model["vocab_size"], -1))
    if token < 0:
        rule = f"is required with a vocabulary of {model['vocab_size']}, which is not DeepSeek-VL2's"
        raise refusal("image_token_id", None, rule, "Add the id that the tokenizer gives <image>")
    model["images"] = {"name": "early_fusion", "image_token": token}


def _write_tiling(decoder: Decoder, config: dict[str, Any]) -> None:
    tiling: Any = show(decoder, "images.tiling")
    config["candidate_resolutions"] = [[c * tiling.tile, r * tiling.tile] for c, r in tiling.candidates]
    config |= {"tile_tag": "2D", "global_view_pos": tiling.global_view}
    config["image_token_id"] = show(decoder, "images.image_token")


DEEPSEEK_VL_V2 = Family(
    model_type=MODEL_TYPE,
    architecture="DeepseekVLV2ForCausalLM",
    template={},
    settings=(
        Part(inside("language_config", _read_language, MODEL_TYPE), _write_language),
        Part(inside("vision_config", _read_vision, MODEL_TYPE), _write_vision),
        Part(inside("projector_config", _read_projector, MODEL_TYPE), _write_projector),
        Part(_read_tiling, _write_tiling),
    ),
    names=(*LANGUAGE, *TOWER, *BETWEEN),
    left_out=(*TABLES, r"vision\.attn_pool\..*"),
    prefix="",
)
