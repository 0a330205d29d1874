"""A SigLIP tower alone, from checkpoints of transformers and timm: what the class computes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig, SiglipVisionModel

from blockwright.blocks.compose import compose
from blockwright.plugins.vision.towers import Tower
from blockwright.registry import ConfigError

SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"image_size": 33, "patch_size": 6}  # 33 pixels are 5 patches of 6: the last 3 are not seen
FFN = {"name": "gelu", "d_ff": 40, "bias": True}
TOWER = {"name": "siglip", "tile": 33, "patch": 6, "width": 24, "depth": 2, "n_heads": 4}
TOWER |= {"norm": {"name": "layernorm", "eps": 1e-6}, "ffn": FFN}
SIGHT = {"images": {"name": "early_fusion", "image_token": 60}, "projector": "linear", "tiling": "native"}


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of transformers under timm's names."""
    named = {}
    for name, tensor in state.items():
        for theirs, other in (
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("embeddings.position_embedding.weight", "pos_embed"),
            ("encoder.layers", "blocks"),
            ("layer_norm", "norm"),
            ("self_attn.out_proj", "attn.proj"),
            ("post_layernorm", "norm"),
        ):
            name = name.replace(theirs, other)
        named[name] = tensor[None] if name == "pos_embed" else tensor
    for i in range(2):
        for leaf in ("weight", "bias"):
            parts = [named.pop(f"blocks.{i}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
            named[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    return {**named, "attn_pool.latent": torch.ones(1, 1, 24)}


@pytest.fixture
def stored(randomise: Callable[..., None], tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    """A folder with a checkpoint of a library, and its tower."""

    def make(kind: str) -> tuple[Path, Any]:
        vision = SiglipVisionConfig(**SIZES, vision_use_head=kind == "both")
        text = SiglipTextConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
        whole: Any = (
            SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
            if kind == "both"
            else SiglipVisionModel(vision)
        )
        randomise(whole)
        folder = tmp_path / kind
        whole.save_pretrained(folder)
        if kind == "timm":
            (folder / "model.safetensors").unlink()
            tensors = {k: v.contiguous() for k, v in as_timm(whole.state_dict()).items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps({"architecture": "vit_so400m_patch14_siglip_384"}))
        return folder, whole.vision_model if kind == "both" else whole

    return make


@pytest.mark.parametrize("kind", ["alone", "both", "timm"])
@torch.no_grad()
def test_tower_computes_what_its_class_does(kind: str, stored: Callable[..., Any], tiny: Callable[..., Any]) -> None:
    folder, reference = stored(kind)
    model = tiny(**SIGHT, vision=TOWER)
    Tower(folder).check(model)
    tiles = torch.randint(256, (3, 3, 33, 33), dtype=torch.uint8)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        decoder = compose(model).to(dtype)
        before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
        Tower(folder).fill(decoder, list)
        changed = {name for name, tensor in decoder.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if name.startswith("images.vision.")}
        expected = reference.eval().to(dtype)(pixel_values=tiles.to(dtype) / 127.5 - 1).last_hidden_state
        found = decoder.images.vision(tiles)  # type: ignore[union-attr]
        torch.testing.assert_close(found, expected.unflatten(1, (5, 5)), rtol=0, atol=bound)


OTHERS: list[tuple[str, dict[str, Any], str]] = [  # of a checkpoint of a library, another tower or none, and a pattern
    ("alone", {"width": 48}, r"width = 24.*model.vision.width=24"),
    ("alone", {"n_heads": 2}, r"n_heads = 4"),
    ("alone", {"depth": 1}, r"depth = 2"),
    ("alone", {"tile": 30}, r"tile = 33"),
    ("alone", {"ffn": {**FFN, "approximate": "none"}}, r"ffn.approximate = tanh"),
    ("alone", {"norm": "rmsnorm"}, r"layer_norm1.bias is \(24,\)"),
    ("alone", {"ffn": {**FFN, "d_ff": 48}}, r"fc1.weight is \(40, 24\)"),
    ("alone", {"name": "clip"}, "model/vision=siglip"),
    ("alone", {}, "reads text alone"),
    ("timm", {"depth": 1}, "blocks.1"),
    ("timm", {"tile": 29}, "pos_embed is"),
    ("none", {"tile": 33}, "no SigLIP tower"),
]


def test_another_tower_is_refused(stored: Callable[..., Any], tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "none" / "model.safetensors")
    folders = {"none": tmp_path / "none", **{kind: stored(kind)[0] for kind in ("alone", "timm")}}
    for kind, changes, word in OTHERS:
        model = tiny(**{**SIGHT, "vision": {**TOWER, **changes}}) if changes else tiny()
        with pytest.raises(ConfigError, match=word) as caught:
            Tower(folders[kind]).check(model)
        assert caught.value.path == "tower.folder"
