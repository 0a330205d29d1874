"""DeepSeek-VL2 twice: composed by us, and assembled from classes of transformers, which has no class for the whole.

The assembled one is ``SiglipVisionModel``, the projector and the marks in plain torch, and ``DeepseekV2ForCausalLM``
fed with embeddings. It encodes all tiles of a batch at once and a 1×1 picture once, as ours does.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shapes import SHAPES, Shape, composition
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.plugins.vision.images import Pictures
from blockwright.plugins.vision.tiling import Grid


@dataclass(frozen=True)
class Sight:
    """Sizes of the image side, and the pictures of a row.

    Args:
        shape: of the language model
        tile, patch, width, depth, n_heads, d_ff: of the tower
        grids: of the pictures at the start of each row
    """

    shape: Shape
    tile: int
    patch: int
    width: int
    depth: int
    n_heads: int
    d_ff: int
    grids: tuple[Grid, ...]


# The sizes of experiment=vl2_small; fields of other families are not read.
PAGES = Shape("pages", 258, 96, 2, 4, 32, 8, 16, 24, 8, 2, 64, 2, 256, 4, 64, sequence=128, batch=10)
SIGHTS: dict[str, Sight] = {
    "smoke": Sight(SHAPES["smoke"], 14, 7, 32, 1, 2, 48, (Grid(2, 1),)),
    "pages": Sight(PAGES, 28, 7, 96, 2, 4, 256, (Grid(2, 2), Grid(3, 1), Grid(1, 1))),
    "tiny": Sight(SHAPES["tiny"], 112, 14, 192, 4, 4, 768, (Grid(2, 2),)),
    "small": Sight(SHAPES["small"], 196, 14, 384, 8, 6, 1536, (Grid(2, 2),)),
}


def sighted(sight: Sight) -> dict[str, Any]:
    """The composition: MLA, DeepSeekMoE after one dense layer, a SigLIP tower, tiles and a thumbnail."""
    shape = sight.shape
    return {
        **composition(shape, "mla_moe"),
        "gating": {"name": "softmax_topk", "top_k": shape.top_k, "renormalise": False},
        "variants": {"ffn": {"dense": {"name": "swiglu", "d_ff": shape.dense_width}}},
        "layout": {"ffn": "dense*1 ffn*"},
        "images": {"name": "early_fusion", "image_token": shape.vocab_size - 1},
        "vision": {
            "name": "siglip",
            "norm": {"name": "layernorm", "eps": 1e-6},
            "ffn": {"name": "gelu", "d_ff": sight.d_ff, "bias": True, "approximate": "tanh"},
            **{key: getattr(sight, key) for key in ("tile", "patch", "width", "depth", "n_heads")},
        },
        "projector": "downsample_mlp",
        "tiling": {"name": "grid_2d", "most_images": len(sight.grids)},
    }


def _text(sight: Sight) -> dict[str, Any]:
    """The composition of the language model alone."""
    return {k: v for k, v in sighted(sight).items() if k not in ("images", "vision", "projector", "tiling")}


@dataclass(frozen=True)
class Seen:
    """A batch: tokens and targets [B,T], and pictures."""

    tokens: Tensor
    targets: Tensor
    pictures: Pictures


def drawn(sight: Sight, images: Any, generator: torch.Generator, device: str) -> Seen:
    """Random pictures at the start of random rows."""
    shape, P = sight.shape, sight.tile
    grids = sight.grids * shape.batch
    n_tiles = sum(map(images.tiling.n_tiles, grids))
    tiles = torch.randint(256, (n_tiles, 3, P, P), generator=generator, dtype=torch.uint8)
    rows = torch.randint(shape.vocab_size - 1, (shape.batch, shape.sequence + 1), generator=generator)
    rows[:, : sum(map(images.tiling.count, sight.grids))] = shape.vocab_size - 1
    tokens, targets = rows[:, :-1], rows[:, 1:]
    targets = targets.masked_fill(targets == shape.vocab_size - 1, IGNORED)
    pictures = Pictures(tiles.to(device), grids)
    return Seen(tokens.contiguous().to(device), targets.contiguous().to(device), pictures)


class Ours(nn.Module):
    """Our decoder."""

    choices: tuple[str, ...] = ()

    def __init__(self, sight: Sight) -> None:
        super().__init__()
        self.decoder = compose(sighted(sight))

    def loss(self, tokens: Tensor, targets: Tensor, pictures: Pictures | None) -> Tensor:
        """Mean next-token loss; of text alone without pictures."""
        hidden, _ = self.decoder.hidden(tokens, media=None if pictures is None else {"images": pictures})
        return self.decoder.nll(hidden, targets) / (targets != IGNORED).sum()

    def see(self, pictures: Pictures) -> Tensor:
        """Embeddings of pictures [Σ,D]."""
        return self.decoder.inputs["images"](pictures)


class Assembled(nn.Module):
    """The same from classes of transformers."""

    choices = ("grouped_mm", "eager")  # implementations of experts

    def __init__(self, sight: Sight) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

        from blockwright.plugins.hub.exporting import recognise

        super().__init__()
        _, values, _ = recognise(compose(_text(sight), device="meta"), "deepseek_v2", {})
        values.pop("architectures")
        config = AutoConfig.for_model(**values)
        self.language: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        tower = SiglipVisionConfig(
            hidden_size=sight.width,
            intermediate_size=sight.d_ff,
            num_hidden_layers=sight.depth,
            num_attention_heads=sight.n_heads,
            image_size=sight.tile,
            patch_size=sight.patch,
            vision_use_head=False,
        )
        self.tower = SiglipVisionModel(tower)  # by SDPA, its default
        self.sight, D = sight, sight.shape.d_model
        self.first, self.second = nn.Linear(4 * sight.width, D), nn.Linear(D, D)
        self.newline, self.separator = (nn.Parameter(torch.randn(D) / D**0.5) for _ in range(2))

    def loss(self, tokens: Tensor, targets: Tensor, pictures: Pictures | None) -> Tensor:
        x = self.embed(tokens, pictures)
        return self.language(inputs_embeds=x, labels=targets, shift_labels=targets, use_cache=False).loss

    def embed(self, tokens: Tensor, pictures: Pictures | None) -> Tensor:
        """Embeddings [B,T,D] of tokens, and of pictures in their places."""
        x = self.language.get_input_embeddings()(tokens)
        if pictures is None:
            return x
        places = tokens == self.sight.shape.vocab_size - 1
        return x.masked_scatter(places[..., None], self.see(pictures))

    def see(self, pictures: Pictures) -> Tensor:
        pixels = pictures.tiles.to(self.newline.dtype) / 127.5 - 1
        side = self.sight.tile // self.sight.patch
        features = self.tower(pixel_values=pixels).last_hidden_state.unflatten(1, (side, side))
        missing = side % 2
        padded = F.pad(features, (0, 0, 0, missing, 0, missing)).permute(0, 3, 1, 2)
        squares = F.unfold(padded, kernel_size=2, stride=2).transpose(1, 2)
        s = (side + 1) // 2
        found = self.second(F.gelu(self.first(squares))).unflatten(1, (s, s))
        parts = found.split([1 if grid == (1, 1) else 1 + grid.columns * grid.rows for grid in pictures.grids])
        return torch.cat([self._sequence(part, grid) for part, grid in zip(parts, pictures.grids, strict=True)])

    def _sequence(self, tiles: Tensor, grid: Grid) -> Tensor:
        joined = tiles[-grid.columns * grid.rows :].unflatten(0, (grid.rows, grid.columns))
        joined = joined.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        views = [
            torch.cat((view, self.newline.expand(len(view), 1, -1)), 1).flatten(0, 1) for view in (tiles[0], joined)
        ]
        return torch.cat((views[0], self.separator[None], views[1]))

    def choose(self, choice: str) -> None:
        self.language.set_experts_implementation(choice)


def equal(sight: Sight, decoder: Decoder) -> Assembled:
    """The assembled model with the weights of ours."""
    from transformers import AutoModelForCausalLM

    from blockwright.blocks.checkpoint.manifest import dump_json
    from blockwright.blocks.checkpoint.shards import write_shards
    from blockwright.plugins.hub.exporting import outgoing, recognise
    from blockwright.plugins.hub.names import links
    from blockwright.plugins.vision.towers import OWN, SIGLIP

    made, ours = Assembled(sight), decoder.state_dict()
    text = compose(_text(sight), device="meta")
    family, values, _ = recognise(text, "deepseek_v2", {})
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), outgoing(family, text, ours, None), 10**10)
        dump_json(Path(name) / "config.json", {**values, "dtype": "float32"})
        made.language = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tower = made.tower.state_dict()
    with torch.no_grad():
        for link in links(SIGLIP, {k: v for k, v in ours.items() if k.startswith(OWN)}, 0):
            link.row.form.view(tower[link.theirs]).copy_(link.part(ours[link.ours]))
    for n, layer in enumerate((made.first, made.second)):
        layer.load_state_dict({leaf: ours[f"images.projector.layers.{n}.{leaf}"] for leaf in ("weight", "bias")})
    made.newline.data, made.separator.data = (ours[f"images.tiling.{k}.weight"] for k in ("newline", "separator"))
    return made.eval()
