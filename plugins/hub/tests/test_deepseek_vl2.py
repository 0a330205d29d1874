"""DeepSeek-VL2 whole against parts of ``transformers`` put together as the released code does, and its checkpoints.

The glue below was compared with the released classes: padding, unfolding, marks and order of the tiles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import MIXTURE, ROPE, SIZES, V
from safetensors.torch import load_file, save_file
from test_deepseek import apart
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.plugins.hub.exporting import export_folder, recognise
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.names import links
from blockwright.plugins.vision.images.base import Pictures
from blockwright.plugins.vision.tiling.base import Grid
from blockwright.registry import ConfigError

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
def released(
    foreign: Callable[..., nn.Module], randomise: Callable[..., None]
) -> Callable[..., tuple[Composite, dict[str, Any]]]:
    """The composite of a size with its config.json."""

    def make(size: str, dtype: torch.dtype) -> tuple[Composite, dict[str, Any]]:
        head, d_model = None, 42
        if size == "tiny":
            from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as module

            d_model = 36
            heads = {"hidden_size": d_model, "num_attention_heads": 6, "num_key_value_heads": 6}
            experts = {k: v for k, v in MIXTURE.items() if k != "first_k_dense_replace"}
            config = module.DeepseekOcr2TextConfig(
                **{**SIZES, **heads, **experts, **ROPE}, mlp_layer_types=["dense"] + ["sparse"] * 3
            )
            config._experts_implementation = "eager"
            language: Any = module.DeepseekOcr2TextModel(config).to(dtype).eval()
            head = torch.randn(V, d_model, generator=torch.Generator().manual_seed(4), dtype=dtype) / d_model**0.5
            values = {**SIZES, **heads, **MIXTURE, "topk_method": "greedy", "use_mla": False, "rope_theta": 500.0}
            zeros = {"qk_nope_head_dim": 0, "v_head_dim": 0, "kv_lora_rank": None, "lm_head": True, "rm_head": False}
            values |= {"model_type": "deepseek_v2", **zeros}
        else:
            language = foreign("deepseek_v2" if size == "small" else "deepseek_v3 one group", dtype)
            values = json.loads(language.config.to_json_string())
            if size == "base":
                values |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
                values.pop("num_nextn_predict_layers"), values.pop("rope_interleave")
        composite = Composite(language, head, d_model).to(dtype).eval()
        for part in (composite.tower, composite.first, composite.second):
            randomise(part)
        if size == "tiny":
            randomise(language)
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


def saved(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@torch.no_grad()
def test_imported_model_computes_what_its_parts_do_and_is_exported_as_it_was(
    size: str,
    released: Callable[..., Any],
    in_double: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    dtype = torch.float64
    composite, config = released(size, dtype)
    tensors = composite.released()
    import_folder(saved(tmp_path / "theirs", {**tensors, **POOL}, config), tmp_path / "ours")
    decoder = load(tmp_path / "ours", dtype=dtype)
    holder: Any = composite.language
    if size == "tiny":
        holder = nn.Module()
        holder.model = composite.language
    in_double(holder, decoder, monkeypatch)
    tokens, targets, pictures = batch()
    expected = composite(tokens, pictures)
    torch.testing.assert_close(decoder(tokens, media={"images": pictures}), expected, rtol=0, atol=1e-10)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="mean")
    own = decoder.nll(decoder.hidden(tokens, media={"images": pictures})[0], targets) / (targets != IGNORED).sum()
    torch.testing.assert_close(own, loss.to(own.dtype), rtol=0, atol=1e-10)
    assert export_folder(tmp_path / "ours", tmp_path / "hf") == ("deepseek_vl_v2", None)
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == tensors.keys() and all(torch.equal(after[k], v) for k, v in tensors.items())


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


def changed(config: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(config))
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return found


OTHER_MODELS: list[tuple[tuple[str, ...], Any, str]] = [
    (("tile_tag",), "1D", "2D"),
    (("candidate_resolutions",), [[70, 70], [70, 140], [210, 70]], "all grids"),
    (("candidate_resolutions",), [[70, 70, 3]], "pairs"),
    (("image_token_id",), None, "required"),
    (("global_view_pos",), "middle", "head"),
    (("vision_config", "global_pool"), "token", "map"),
    (("vision_config", "mystery"), 3, "does not read"),
    (("projector_config", "projector_type"), "identity", "downsample_mlp_gelu"),
    (("projector_config", "token_pooling"), True, "False"),
    (("projector_config", "input_dim"), 1152, "48"),
    (("language_config", "lm_head"), False, "true"),
    (("language_config", "mystery"), 3, "does not read"),
]


def test_configuration_that_would_compute_something_else_is_refused_by_name() -> None:
    language = {**SIZES, **MIXTURE, "topk_method": "greedy", "use_mla": False, "rope_theta": 500.0}
    config = released_config({**language, "num_attention_heads": 6, "hidden_size": 36}, 36)
    family = FAMILIES["deepseek_vl_v2"]
    compose(family.composition(config), device="meta")
    for path, value, word in OTHER_MODELS:
        with pytest.raises(ConfigError) as caught:
            compose(family.composition(changed(config, path, value)), device="meta")
        error = caught.value
        assert path[-1].removesuffix("_pos") in error.path and word in f"{error.rule} {error.remedy}", str(error)
