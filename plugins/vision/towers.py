"""``tower=siglip tower.folder=DIR``: the weights of a vision tower alone, as ``transformers`` and timm store them.

The text tower and the pooling head of a checkpoint are left out. SigLIP's GELU is the tanh approximation; of timm's
checkpoints, which do not say so, only the shapes are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.checkpoint.manifest import read_json
from blockwright.blocks.checkpoint.shards import Shards
from blockwright.blocks.compose import compose
from blockwright.plugins.hub.families.deepseek_vl_v2 import OURS, TOWER
from blockwright.plugins.hub.names import PATCHES, Link, Row, links
from blockwright.plugins.vision.vision import SigLIP
from blockwright.registry import ConfigError, register
from blockwright.registry.schema import Place
from blockwright.training.starts import Start

PATH, OWN = "tower.folder", "images.vision."
LAYER = "encoder.layers.{i}."
SIGLIP = (
    Row(f"{OWN}patches.project.weight", "embeddings.patch_embedding.weight", form=PATCHES),
    Row(f"{OWN}patches.project.bias", "embeddings.patch_embedding.bias"),
    Row(f"{OWN}patches.position.weight", "embeddings.position_embedding.weight"),
    *(
        Row(f"{OURS}attention.{ours}.*", f"{LAYER}self_attn.{theirs}_proj.*")
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out"))
    ),
    Row(f"{OURS}attention_norm.*", f"{LAYER}layer_norm1.*"),
    Row(f"{OURS}ffn_norm.*", f"{LAYER}layer_norm2.*"),
    Row(f"{OURS}ffn.up.*", f"{LAYER}mlp.fc1.*"),
    Row(f"{OURS}ffn.down.*", f"{LAYER}mlp.fc2.*"),
    Row(f"{OWN}norm.*", "post_layernorm.*"),
)
TIMM = tuple(Row(row.ours, row.theirs.removeprefix("vision."), row.part, row.form) for row in TOWER)
TABLES = {"embeddings.patch_embedding.weight": SIGLIP, "patch_embed.proj.weight": TIMM}
# Values that transformers leaves out of config.json, and ours.
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
GELUS = {"gelu_pytorch_tanh": "tanh", "gelu": "none", "quick_gelu": "sigmoid"}


@register("start", "tower")
class Tower(Start):
    """The vision tower of a checkpoint, SigLIP's; everything else of the model starts as without it.

    Args:
        folder: with safetensors and config.json
    """

    def __init__(self, folder: Place) -> None:
        self.folder = Path(folder)

    @cached_property
    def shards(self) -> Shards:
        """The checkpoint, of which only headers are read."""
        try:
            return Shards(self.folder)
        except ConfigError as error:
            raise ConfigError(PATH, error.path, error.rule, error.remedy) from None

    @cached_property
    def layout(self) -> tuple[tuple[Row, ...], str]:
        """The names of its tensors, and what stands before them.

        Raises:
            ConfigError: at ``tower.folder``: there is no tower
        """
        for name, rows in TABLES.items():
            for prefix in ("", "vision_model.", "vision.", "visual.trunk."):
                if prefix + name in self.shards.entries:
                    return rows, prefix
        rule = "holds no SigLIP tower under names of transformers or timm"
        remedy = "Name a folder with SiglipModel, SiglipVisionModel or timm's weights"
        raise ConfigError(PATH, str(self.folder), rule, remedy)

    def check(self, model: Mapping[str, Any]) -> list[str]:
        rows, _ = self.layout
        images = compose(model, device="meta").inputs.get("images")
        if images is None:
            raise ConfigError(PATH, str(self.folder), "the model reads text alone", "Choose one with images")
        vision: Any = images.vision
        if type(vision) is not SigLIP:
            rule = f"holds a SigLIP tower, and model.vision is {type(vision).__name__}"
            raise ConfigError(PATH, str(self.folder), rule, "Write model/vision=siglip")
        if rows is SIGLIP:
            self._check_settings(vision)
        self._check_tensors({OWN + name: tensor for name, tensor in vision.state_dict().items()})
        return []

    def _check_settings(self, vision: Any) -> None:
        config, layer = read_json(self.folder / "config.json"), vision.layers[0]
        theirs = {**DEFAULTS, **config.get("vision_config", config)}
        act = theirs["hidden_act"]
        for name, value, found in (
            ("tile", theirs["image_size"], vision.tile),
            ("patch", theirs["patch_size"], vision.patches.patch),
            ("width", theirs["hidden_size"], vision.width),
            ("depth", theirs["num_hidden_layers"], len(vision.layers)),
            ("n_heads", theirs["num_attention_heads"], vision.width // layer.attention.head_dim),
            ("norm.eps", theirs["layer_norm_eps"], getattr(vision.norm, "eps", None)),
            ("ffn.approximate", GELUS.get(act, act), getattr(layer.ffn, "approximate", None)),
        ):
            if found != value:
                rule = f"was trained with {name} = {value}, and model.vision has {found}"
                raise ConfigError(PATH, str(self.folder), rule, f"Write model.vision.{name}={value}")

    def _check_tensors(self, ours: Mapping[str, Tensor]) -> None:
        rows, prefix = self.layout
        wanted = {prefix + link.theirs: link.shape(ours[link.ours]) for link in links(rows, ours, 0)}
        known = tuple(prefix + row.theirs.partition("{")[0].rstrip("*") for row in rows)
        theirs = {name: entry.shape for name, entry in self.shards.entries.items() if name.startswith(known)}
        for name in {**wanted, **theirs}:
            if theirs.get(name) != wanted.get(name):
                here = f"{wanted[name]} here" if name in wanted else "nothing here"
                rule = f"has another tower: {name} is {theirs.get(name, 'missing')} there and {here}"
                raise ConfigError(PATH, str(self.folder), rule, "Write its sizes at model.vision")

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        rows, before = self.layout
        ours = {prefix + k: tensor for k, tensor in part.state_dict().items() if (prefix + k).startswith(OWN)}
        by_name: dict[str, list[Link]] = {}
        for link in links(rows, ours, 0):
            by_name.setdefault(before + link.theirs, []).append(link)
        with torch.no_grad():
            for name, tensor in self.shards.read(by_name):
                for link in by_name[name]:
                    link.part(ours[link.ours]).copy_(link.row.form.view(tensor))
