"""DeepSeek beyond the classes of ``transformers``: DeepSeekMoE, multi-token prediction, and DeepSeek-VL2 whole.

VL2 is compared with parts of ``transformers`` put together as the released code does. The glue was compared with the
released classes: padding, unfolding, marks and order of the tiles.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import LAYERS, MIXTURE, ROPE, SIZES, D, V
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as ocr2

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.plugins.hub import hf_import
from blockwright.plugins.hub.exporting import export_folder, recognise
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.names import links
from blockwright.plugins.vision.images import Pictures
from blockwright.plugins.vision.tiling import Grid
from blockwright.registry import ConfigError

Make = Callable[..., Any]
SMALL = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6}


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a folder holds these, bit-identical."""
    after = load_file(folder / "model.safetensors")
    return after.keys() == tensors.keys() and all(torch.equal(after[k], v) for k, v in tensors.items())


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


def text_of_ocr2(randomise: Make, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The one class of ``transformers`` with multi-head attention and DeepSeek's experts, and a head."""
    experts = {k: v for k, v in MIXTURE.items() if k != "first_k_dense_replace"}
    types = ["dense"] + ["sparse"] * (LAYERS - 1)
    config = ocr2.DeepseekOcr2TextConfig(**{**SIZES, **SMALL, **experts, **ROPE}, mlp_layer_types=types)
    config._experts_implementation = "eager"
    model = ocr2.DeepseekOcr2TextModel(config).to(dtype).eval()
    randomise(model)
    return model, torch.randn(V, 36, generator=torch.Generator().manual_seed(4), dtype=dtype) / 6


def holding(model: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.model = model
    return holder


@torch.no_grad()
def test_deepseek_moe_equals_the_text_model_of_deepseek_ocr2(
    randomise: Make, in_double: Make, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, head = text_of_ocr2(randomise, torch.float64)
    tensors = {f"model.{k}": v for k, v in apart(model.state_dict()).items()} | {"lm_head.weight": head}
    released = {**SIZES, **SMALL, **MIXTURE, "model_type": "deepseek", "rope_theta": 500.0, "rope_scaling": None}
    more = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "scoring_func": "softmax", "norm_topk_prob": False}
    extra = {"aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "auto_map": {"AutoConfig": "x.Y"}}
    import_folder(written(tmp_path / "in", tensors, {**released, **more, **extra}), tmp_path / "out")
    decoder = load(tmp_path / "out", dtype=torch.float64)
    in_double(holding(model), decoder, monkeypatch)
    torch.testing.assert_close(decoder(tokens), model(tokens).last_hidden_state @ head.T, rtol=0, atol=1e-10)
    export_folder(tmp_path / "out", tmp_path / "hf")
    assert same(tmp_path / "hf", tensors)


@torch.no_grad()
def test_half_split_positions_of_v3_are_those_of_a_permutation_of_rows(
    foreign: Make, checkpoint: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """The switch ``rope_interleave`` of transformers, against our two pairings."""
    theirs = foreign("deepseek_v3")
    import_folder(checkpoint("deepseek_v3"), tmp_path / "out")
    decoder = load(tmp_path / "out")
    position = {**decoder.config["position"], "pairing": "half_split"}
    split = compose({**decoder.config, "position": position})
    split.load_state_dict(decoder.state_dict())
    theirs.config.rope_interleave = False
    torch.testing.assert_close(split.eval()(tokens), theirs(tokens).logits, rtol=0, atol=2e-5)
    assert (split(tokens) - decoder(tokens)).abs().max() > 0.01
    turned = [*range(0, 6, 2), *range(1, 6, 2)]
    for layer in split.layers:
        queries, keys = layer.attention.query[2].weight.view(6, 14, 13), layer.attention.kv_down.weight
        queries[:, 8:] = queries[:, 8:][:, turned]
        keys[12:] = keys[12:][turned]
    torch.testing.assert_close(split(tokens), decoder(tokens), rtol=0, atol=1e-5)


# ---- heads of multi-token prediction ---------------------------------------------------------------------------------


@pytest.fixture
def predicting(checkpoint: Make) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """A V3, or a GLM-4.5, whose head of prediction stands behind the last layer, as released."""

    def make(name: str) -> tuple[Path, dict[str, Tensor]]:
        folder = checkpoint(name)
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
        return written(folder, tensors, values), tensors

    return make


def test_heads_of_prediction_are_left_out_unless_asked_for_and_come_out_as_they_went_in(
    predicting: Callable[[str], tuple[Path, dict[str, Tensor]]], tokens: Tensor, tmp_path: Path
) -> None:
    folder, theirs = predicting("deepseek_v3")
    import_folder(folder, tmp_path / "without")
    assert hf_import.main([str(folder), str(tmp_path / "with"), "--mtp"]) == 0
    without, whole = (load_file(tmp_path / x / "model.safetensors") for x in ("without", "with"))
    assert not any(name.startswith("mtp") for name in without)
    further = {name: tensor for name, tensor in whole.items() if name.startswith("mtp.0.")}
    assert {**without, **further}.keys() == whole.keys() and len(further) > 10
    assert torch.equal(further["mtp.0.project.weight"], theirs[f"model.layers.{LAYERS}.eh_proj.weight"])
    assert torch.equal(further["mtp.0.embedding_norm.weight"], theirs[f"model.layers.{LAYERS}.enorm.weight"])
    assert torch.equal(load(tmp_path / "with")(tokens), load(tmp_path / "without")(tokens))
    assert export_folder(tmp_path / "with", tmp_path / "hf") == ("deepseek_v3", None) and same(tmp_path / "hf", theirs)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    missing = {name: tensor for name, tensor in theirs.items() if f"layers.{LAYERS}." not in name}
    save_file(missing, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"model\.layers\.{LAYERS}\."):
        import_folder(folder, tmp_path / "no", mtp=True)


def test_repeated_embedding_of_a_head_of_prediction_must_be_the_models(
    predicting: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, tensors = predicting("glm4_moe")
    import_folder(folder, tmp_path / "with", mtp=True)
    assert export_folder(tmp_path / "with", tmp_path / "hf") == ("glm4_moe", None) and same(tmp_path / "hf", tensors)
    tensors[f"model.layers.{LAYERS}.embed_tokens.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="embed"):
        import_folder(folder, tmp_path / "no", mtp=True)
    assert not (tmp_path / "no").exists()
    import_folder(folder, tmp_path / "no")


# ---- DeepSeek-VL2 ----------------------------------------------------------------------------------------------------

W, TILE, SIDE, IMAGE, LENGTH = 48, 70, 3, 90, 120
ROWS = [[Grid(2, 1), Grid(1, 1)], [Grid(1, 2)], [Grid(3, 3)], []]
GRIDS = [grid for row in ROWS for grid in row]


class Composite(nn.Module):
    """A tower, two linear layers, two marks and a language model."""

    def __init__(self, language: nn.Module, head: Tensor | None, d_model: int) -> None:
        super().__init__()
        sizes = {"hidden_size": W, "intermediate_size": int(W * 3.7362), "num_hidden_layers": 2}
        config = SiglipVisionConfig(
            **sizes, num_attention_heads=4, image_size=TILE, patch_size=14, vision_use_head=False
        )
        self.tower = SiglipVisionModel(config)
        self.first, self.second = nn.Linear(4 * W, d_model), nn.Linear(d_model, d_model)
        self.newline, self.separator = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.language, self.head = language, head

    def embeddings(self, tiles: Tensor) -> Tensor:
        """[N,3,P,P] uint8 → [N,3,3,D]."""
        pixels = tiles.to(self.newline.dtype) / 127.5 - 1
        features = self.tower(pixel_values=pixels).last_hidden_state.unflatten(1, (5, 5))
        padded = F.pad(features, (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
        squares = F.unfold(padded, kernel_size=2, stride=2).transpose(1, 2)
        return self.second(F.gelu(self.first(squares))).unflatten(1, (SIDE, SIDE))

    def sequence(self, tiles: Tensor, grid: Grid) -> list[Tensor]:
        """Embeddings of a picture in order; a 1×1 picture's one tile is encoded twice, as released."""
        found = self.embeddings(tiles if grid != (1, 1) else tiles.repeat(2, 1, 1, 1))
        picture: list[Tensor] = []
        for y in range(SIDE):
            picture += [*found[0, y], self.newline]
        picture.append(self.separator)
        for y in range(SIDE * grid.rows):
            for x in range(SIDE * grid.columns):
                tile = 1 + y // SIDE * grid.columns + x // SIDE
                picture.append(found[tile, y % SIDE, x % SIDE])
            picture.append(self.newline)
        return picture

    def forward(self, tokens: Tensor, pictures: Pictures) -> Tensor:
        model: Any = self.language if self.head is not None else self.language.model
        x, start = model.embed_tokens(tokens).clone(), 0
        found: list[Tensor] = []
        for grid in pictures.grids:
            n = 1 if grid == (1, 1) else 1 + grid.columns * grid.rows
            found += self.sequence(pictures.tiles[start : start + n], grid)
            start += n
        x[tokens == IMAGE] = torch.stack(found)
        if self.head is None:
            return self.language(inputs_embeds=x).logits  # type: ignore[operator]
        return self.language(inputs_embeds=x).last_hidden_state @ self.head.T

    def released(self) -> dict[str, Tensor]:
        """The tensors under the names of the released checkpoints, with a pooling head that is never run."""
        own, named = self.tower.state_dict(), {}
        renamed = {
            "embeddings.patch_embedding": "patch_embed.proj",
            "embeddings.position_embedding.weight": "pos_embed",
            "encoder.layers": "blocks",
            "layer_norm": "norm",
            "self_attn.out_proj": "attn.proj",
            "post_layernorm": "norm",
        }
        for name, tensor in own.items():
            name = name.removeprefix("vision_model.")
            for theirs, ours in renamed.items():
                name = name.replace(theirs, ours)
            named[f"vision.{name}"] = tensor[None] if name == "pos_embed" else tensor
        for i in range(2):
            for leaf in ("weight", "bias"):
                parts = [named.pop(f"vision.blocks.{i}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
                named[f"vision.blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
        for n, layer in ((0, self.first), (2, self.second)):
            named |= {f"projector.layers.{n}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
        named |= {"image_newline": self.newline.data, "view_seperator": self.separator.data}
        prefix = "language." if self.head is None else "language.model."
        language = {f"{prefix}{k}": v for k, v in apart(self.language.state_dict()).items()}
        language |= {} if self.head is None else {"language.lm_head.weight": self.head}
        return {**named, **language}


POOL = {"vision.attn_pool.latent": torch.ones(1, 1, W), "vision.attn_pool.mlp.fc1.bias": torch.ones(3)}


def released_config(language: dict[str, Any], d_model: int) -> dict[str, Any]:
    tower = {"layers": 2, "width": W, "patch_size": 14, "mlp_ratio": 3.7362, "image_size": TILE, "heads": 4}
    return {
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": [[TILE * c, TILE * r] for r in range(1, 10) for c in range(1, 10) if c * r <= 9],
        "tile_tag": "2D",
        "global_view_pos": "head",
        "vision_config": {**tower, "model_name": "siglip_so400m_patch14_384", "model_type": "vision"},
        "projector_config": {"model_type": "mlp_projector", "n_embed": d_model, "input_dim": W},
        "language_config": language,
        "image_token_id": IMAGE,
    }


@pytest.fixture
def released(foreign: Make, randomise: Make) -> Callable[..., tuple[Composite, dict[str, Any]]]:
    """The composite of a size with its config.json."""

    def make(size: str, dtype: torch.dtype) -> tuple[Composite, dict[str, Any]]:
        head = None
        if size == "tiny":
            language, head = text_of_ocr2(randomise, dtype)
            values = {**SIZES, **SMALL, **MIXTURE, "topk_method": "greedy", "use_mla": False, "rope_theta": 500.0}
            zeros = {"qk_nope_head_dim": 0, "v_head_dim": 0, "kv_lora_rank": None, "lm_head": True, "rm_head": False}
            values |= {"model_type": "deepseek_v2", **zeros}
        else:
            language = foreign("deepseek_v2" if size == "small" else "deepseek_v3 one group", dtype)
            values = json.loads(language.config.to_json_string())
            if size == "base":
                values |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
                values.pop("num_nextn_predict_layers"), values.pop("rope_interleave")
        d_model = values["hidden_size"]
        composite = Composite(language, head, d_model).to(dtype).eval()
        for part in (composite.tower, composite.first, composite.second):
            randomise(part)
        for n, mark in enumerate((composite.newline, composite.separator)):
            mark.data = torch.randn(d_model, generator=torch.Generator().manual_seed(n), dtype=dtype)
        return composite, released_config(values, d_model)

    return make


def batch() -> tuple[Tensor, Tensor, Pictures]:
    """Tokens, targets and pictures: rows with two pictures, one, one of nine tiles, none; text around each."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(IMAGE, (len(ROWS), LENGTH), generator=generator)
    for row, grids in zip(tokens, ROWS, strict=True):
        start = 2
        for c, r in grids:
            end = start + SIDE * (SIDE + 1) + 1 + SIDE * r * (SIDE * c + 1)
            row[start:end] = IMAGE
            start = end + 3
    n_tiles = sum(1 if grid == (1, 1) else 1 + grid.columns * grid.rows for grid in GRIDS)
    tiles = torch.randint(256, (n_tiles, 3, TILE, TILE), generator=generator, dtype=torch.uint8)
    targets = tokens.roll(-1, 1).masked_fill(tokens.roll(-1, 1) == IMAGE, IGNORED)
    return tokens, targets, Pictures(tiles, GRIDS)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@torch.no_grad()
def test_imported_model_computes_what_its_parts_do_and_is_exported_as_it_was(
    size: str, released: Make, in_double: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dtype = torch.float64
    composite, config = released(size, dtype)
    tensors = composite.released()
    import_folder(written(tmp_path / "theirs", {**tensors, **POOL}, config), tmp_path / "ours")
    decoder = load(tmp_path / "ours", dtype=dtype)
    in_double(holding(composite.language) if size == "tiny" else composite.language, decoder, monkeypatch)
    tokens, targets, pictures = batch()
    expected = composite(tokens, pictures)
    torch.testing.assert_close(decoder(tokens, media={"images": pictures}), expected, rtol=0, atol=1e-10)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="mean")
    own = decoder.nll(decoder.hidden(tokens, media={"images": pictures})[0], targets) / (targets != IGNORED).sum()
    torch.testing.assert_close(own, loss.to(own.dtype), rtol=0, atol=1e-10)
    assert export_folder(tmp_path / "ours", tmp_path / "hf") == ("deepseek_vl_v2", None)
    assert same(tmp_path / "hf", tensors)


SIZES_OF_FILES = {  # parameters and tensors of the released files; the pooling head; biases of choice
    "tiny": (3_370_501_440, 2_582, 0),
    "small": (16_148_349_504, 5_639, 0),
    "base": (27_480_134_248, 6_973, 29 * 72),
}
POOLING = (15_238_352, 13)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES_OF_FILES)
def test_preset_has_the_tensors_of_the_released_file_but_the_pooling_head(size: str) -> None:
    decoder = compose(preset(f"deepseek_vl2_{size}"), device="meta")
    family, _, why = recognise(decoder, None, {})
    assert (family.model_type, why) == ("deepseek_vl_v2", None)
    names = {link.theirs for link in links(FAMILIES["deepseek_vl_v2"].names, decoder.state_dict(), 0) if link.theirs}
    parameters, tensors, biases = SIZES_OF_FILES[size]
    assert sum(p.numel() for p in decoder.parameters()) + biases + POOLING[0] == parameters
    assert len(names) + POOLING[1] == tensors


OTHER_MODELS: list[tuple[str, Any]] = [
    ("tile_tag", "1D"),
    ("candidate_resolutions", [[70, 70], [70, 140], [210, 70]]),  # not all grids
    ("candidate_resolutions", [[70, 70, 3]]),
    ("image_token_id", None),
    ("global_view_pos", "middle"),
    ("vision_config.global_pool", "token"),
    ("vision_config.mystery", 3),
    ("projector_config.projector_type", "identity"),
    ("projector_config.token_pooling", True),
    ("projector_config.input_dim", 1152),
    ("language_config.lm_head", False),
    ("language_config.mystery", 3),
]


def test_configuration_that_would_compute_something_else_is_refused_by_name() -> None:
    language = {**SIZES, **SMALL, **MIXTURE, "topk_method": "greedy", "use_mla": False, "rope_theta": 500.0}
    config, family = released_config(language, 36), FAMILIES["deepseek_vl_v2"]
    compose(family.composition(config), device="meta")
    for path, value in OTHER_MODELS:
        found = json.loads(json.dumps(config))
        node, _, key = path.rpartition(".")
        (found[node] if node else found)[key] = value
        with pytest.raises(ConfigError) as caught:
            compose(family.composition(found), device="meta")
        assert key.removesuffix("_pos") in caught.value.path, str(caught.value)
