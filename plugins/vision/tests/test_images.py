"""The image side of a decoder: tiling, towers, projectors, and embeddings where tokens enter.

Parity with the released model's parts is in plugins/hub/tests/test_deepseek.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from blockwright.blocks.compose import check, compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import prefill
from blockwright.blocks.initialise import initialise
from blockwright.plugins.vision.images import Pictures
from blockwright.plugins.vision.tiling import Grid
from blockwright.registry import BlockError, ConfigError

IMAGE = 60
TOWER = {"name": "siglip", "tile": 30, "patch": 6, "width": 24, "depth": 2, "n_heads": 4}
NORM, GELU = {"name": "layernorm", "eps": 1e-6}, {"name": "gelu", "d_ff": 40, "bias": True}
SIGHT = {
    "images": {"name": "early_fusion", "image_token": IMAGE},
    "vision": {**TOWER, "norm": NORM, "ffn": GELU},
    "projector": {"name": "downsample_mlp"},
    "tiling": {"name": "grid_2d"},
}


@pytest.fixture
def decoder(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Decoder:
    made = compose(tiny(moe=True, max_positions=256, **SIGHT)).double().eval()
    randomise(made, scale=0.7)
    return made


def tiles(n: int, size: int = 30, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def text(n: int, seed: int = 0) -> Tensor:
    return torch.randint(IMAGE, (1, n), generator=torch.Generator().manual_seed(seed))


# --- tiling -----------------------------------------------------------------------------------------------------------


def of_vl2(**changes: Any) -> Any:
    """The tiling of DeepSeek-VL2, 14 embeddings a side of a tile."""
    model = preset("deepseek_vl2_tiny_language", {"n_layers": 1, **SIGHT, "ffn": "swiglu", "layout": None})
    model |= {"vision": {**SIGHT["vision"], "tile": 384, "patch": 14}, "variants": None, "gating": None}
    images: Any = compose({**model, "experts": None, "tiling": {"name": "grid_2d", **changes}}, device="meta").images
    return images.tiling


# Columns × rows → embeddings, as published and as the released code counts; sizes → columns × rows.
COUNTS = {(1, 1): 421, (2, 1): 617, (1, 2): 631, (3, 1): 813, (1, 3): 841, (2, 2): 1023, (3, 2): 1415, (2, 3): 1429}
COUNTS |= {(4, 2): 1807, (2, 4): 1835, (9, 1): 1989, (1, 9): 2101, (3, 3): 2017}
GRIDS = {(640, 480): (2, 2), (1024, 768): (3, 2), (1920, 1080): (4, 2), (1080, 1920): (2, 4), (3000, 500): (6, 1)}
GRIDS |= {(800, 800): (3, 3), (2480, 3508): (3, 3), (100, 100): (1, 1)}


def test_grids_and_counts_are_those_of_the_released_model() -> None:
    tiling = of_vl2()
    assert len(tiling.candidates) == 23
    assert {grid: tiling.count(Grid(*grid)) for grid in COUNTS} == COUNTS
    assert {size: tiling.grid(*size) for size in GRIDS} == GRIDS
    assert tiling.grid(1920, 1080, 2) == (4, 2) and tiling.grid(1920, 1080, 3) == (1, 1)
    assert of_vl2(max_tiles=18).grid(3000, 500) != (6, 1) and of_vl2(max_tiles=2).grid(800, 800) == (1, 1)


def test_grid_of_two_thousand_sizes_is_that_of_a_second_reading_of_the_rule() -> None:
    tiling, draw = of_vl2(), random.Random(0)
    candidates = [
        (384 * c, 384 * r) for area in range(1, 10) for c in range(9, 0, -1) for r in [area / c] if r % 1 == 0
    ]
    for _ in range(2_000):
        w, h = (int(2 ** draw.uniform(3, 13)) for _ in range(2))
        best, most, least = (0, 0), 0, float("inf")
        for width, height in candidates:  # LLaVA-NeXT's loop
            scale = min(width / w, height / h)
            effective = min(int(w * scale) * int(h * scale), w * h)
            wasted = width * height - effective
            if effective > most or (effective == most and wasted < least):
                best, most, least = (int(width), int(height)), effective, wasted
        assert tiling.grid(w, h) == (best[0] // 384, best[1] // 384), (w, h)


@pytest.mark.parametrize("name", ["grid_2d", "thumbnail", "native"])
def test_as_many_embeddings_are_made_as_counted_for_every_grid(tiny: Callable[..., Any], name: str) -> None:
    images: Any = compose(tiny(**{**SIGHT, "tiling": {"name": name}})).images
    grids = [Grid(c, r) for c in range(1, 5) for r in range(1, 5)]
    grids = [grid for grid in grids if name == "grid_2d" or grid == (1, 1)]
    n = [sum(c * r for c, r in images.tiling.canvases(grid)) for grid in grids]
    assert all(
        len(images(Pictures(tiles(k), [grid]))) == images.tiling.count(grid) for k, grid in zip(n, grids, strict=True)
    )
    assert len(images(Pictures(tiles(sum(n)), grids))) == sum(map(images.tiling.count, grids))


@torch.no_grad()
def test_tiles_are_joined_row_by_row_across_them(decoder: Decoder) -> None:
    """Features that say where they are: 3 columns × 2 rows of tiles, s = 3."""
    tiling: Any = decoder.images.tiling  # type: ignore[union-attr]
    s, D = tiling.side, 48
    where = torch.arange(7 * s * s).view(7, s, s, 1).expand(-1, -1, -1, D).double()
    found = tiling.sequence(where, Grid(3, 2))
    newline, separator = tiling.newline.weight, tiling.separator.weight
    expected: list[Tensor] = []
    for y in range(s):
        expected += [*where[0, y], newline]
    expected.append(separator)
    for y in range(2 * s):
        expected += [where[1 + y // s * 3 + x // s, y % s, x % s] for x in range(3 * s)] + [newline]
    assert torch.equal(found, torch.stack(expected))
    tiling.global_view = "tail"
    n = s * (s + 1)
    assert torch.equal(tiling.sequence(where, Grid(3, 2)), torch.cat((found[n + 1 :], found[n : n + 1], found[:n])))


# --- towers and projectors --------------------------------------------------------------------------------------------


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower of transformers under our names."""
    renamed = {
        "embeddings.patch_embeddings.projection": "patches.project", "embeddings.patch_embedding": "patches.project",
        "embeddings.position_embeddings": "patches.position.weight",
        "embeddings.position_embedding.weight": "patches.position.weight",
        "encoder.layers.": "layers.", "encoder.layer.": "layers.", "layer_norm1": "attention_norm",
        "layer_norm2": "ffn_norm", "norm1": "attention_norm", "norm2": "ffn_norm",
        "attention.attention.": "attention.", "attention.output.dense": "attention.output", "self_attn.": "attention.",
        "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output", "o_proj": "output",
        "layer_scale1.lambda1": "attention_gain.weight", "layer_scale2.lambda1": "ffn_gain.weight",
        "mlp.fc1": "ffn.up", "mlp.fc2": "ffn.down", "pre_layrnorm": "pre_norm", "layernorm.": "norm.",
    }  # fmt: skip
    found = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("vision_model.")
        for old, new in renamed.items():
            name = name.replace(old, new, 1)
        tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        found[name] = tensor[0] if name == "patches.position.weight" and tensor.ndim == 3 else tensor
    further = [found.pop(k) for k in ("embeddings.cls_token", "embeddings.register_tokens") if k in found]
    further += [found.pop("embeddings.class_embedding")[None, None]] if "embeddings.class_embedding" in found else []
    if further:
        found["patches.further.weight"] = torch.cat(further, 1)[0]
    return found


SIZES = {"hidden_size": 24, "num_attention_heads": 4, "image_size": 33, "patch_size": 6}
OURS = {"tile": 33, "patch": 6, "width": 24, "n_heads": 4}


DINO = {"depth": 2, "norm": NORM, "layer_scale": 1.0, "ffn": {**GELU, "d_ff": 48, "approximate": "none"}}
CLIP = {"depth": 2, "norm": {"name": "layernorm"}, "ffn": {**GELU, "approximate": "sigmoid"}}
OF_CLIP = {"num_hidden_layers": 3, "intermediate_size": 40, "layer_norm_eps": 1e-5}
OF_DINO = {"num_hidden_layers": 2, "mlp_ratio": 2}
TOWERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("clip", "CLIPVisionModel", OF_CLIP, CLIP),
    ("dinov2", "Dinov2Model", OF_DINO, DINO),
    ("dinov2", "Dinov2WithRegistersModel", {**OF_DINO, "num_register_tokens": 3}, {**DINO, "registers": 3}),
]


@pytest.mark.parametrize(("name", "theirs", "settings", "ours"), TOWERS)
@torch.no_grad()
def test_tower_equals_that_of_transformers(
    name: str, theirs: str, settings: dict[str, Any], ours: dict[str, Any], tiny: Any, randomise: Any
) -> None:
    """CLIP's features are those before its last block. 33 pixels are 5 patches of 6: the last 3 are not seen."""
    config = getattr(transformers, theirs.replace("Model", "Config"))(**SIZES, **settings)
    reference = getattr(transformers, theirs)(config).double().eval()
    randomise(reference)
    tower: Any = compose(tiny(**{**SIGHT, "vision": {"name": name, **OURS, **ours}})).double().images.vision  # type: ignore[union-attr]
    own, last = our_names(reference.state_dict()), f"layers.{settings['num_hidden_layers'] - 1}."
    unused = ("post_norm", *([last] if name == "clip" else []))
    tower.load_state_dict({k: v for k, v in own.items() if "mask_token" not in k and not k.startswith(unused)})
    given = tiles(2, 33)
    pixels = (given.double() / 255 - torch.tensor(tower.mean)[:, None, None]) / torch.tensor(tower.std)[:, None, None]
    out = reference(pixel_values=pixels.double(), output_hidden_states=True)
    expected = out.hidden_states[-2] if name == "clip" else out.last_hidden_state
    n = 1 + settings.get("num_register_tokens", 0)
    torch.testing.assert_close(tower(given), expected[:, n:].unflatten(1, (5, 5)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_marked_feature_lands_where_unfold_puts_it(tiny: Callable[..., Any]) -> None:
    projector: Any = compose(tiny(**SIGHT)).images.projector  # type: ignore[union-attr]
    seen: list[Tensor] = []
    projector.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    features = torch.zeros(1, 5, 5, 24)
    features[0, 3, 2, 7] = 1.0  # row 3 = 2·1 + 1, column 2 = 2·1 + 0
    projector(features)
    assert seen[0].shape == (1, 3, 3, 96) and seen[0].nonzero().tolist() == [[0, 1, 1, 7 * 4 + 1 * 2 + 0]]


def test_marks_and_positions_start_as_published(tiny: Callable[..., Any]) -> None:
    """Marks normal with 1/√D, positions with 1/√W; the rule alone would give marks of 1."""
    made = compose({**tiny(**SIGHT), "d_model": 480, "attention": {"name": "gqa", "n_heads": 8}}, seed=3)
    images: Any = made.images
    for mark in (images.tiling.newline.weight, images.tiling.separator.weight):
        assert mark.std().item() == pytest.approx(480**-0.5, rel=0.15) and abs(mark.mean().item()) < 0.01
    assert images.vision.patches.position.weight.std().item() == pytest.approx(24**-0.5, rel=0.1)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    initialise(made, std=0.05, depth_scaled=False, n_layers=2, seed=3)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


# --- the decoder ------------------------------------------------------------------------------------------------------


def row(decoder: Decoder, grids: list[Grid], seed: int, n: int = 5) -> tuple[Tensor, Pictures]:
    """Text, then each picture with text behind it; and the pictures."""
    tiling: Any = decoder.images.tiling  # type: ignore[union-attr]
    parts = [text(n, seed)]
    for i, grid in enumerate(grids):
        parts += [torch.full((1, tiling.count(grid)), IMAGE), text(n, seed + i + 1)]
    n_tiles = sum(c * r for grid in grids for c, r in tiling.canvases(grid))
    return torch.cat(parts, 1), Pictures(tiles(n_tiles, seed=seed), grids)


def together(*pictures: Pictures) -> Pictures:
    return Pictures(torch.cat([p.tiles for p in pictures]), [grid for p in pictures for grid in p.grids])


ROWS = [[Grid(2, 1), Grid(1, 1)], [], [Grid(1, 1)]]


@torch.no_grad()
def test_rows_packed_into_one_give_what_each_gives_alone(decoder: Decoder) -> None:
    rows = [row(decoder, grids, 10 * i) for i, grids in enumerate(ROWS)]
    lengths = [tokens.shape[1] for tokens, _ in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    packed = torch.cat([tokens for tokens, _ in rows], 1)
    found = decoder(packed, positions, segments, media={"images": together(*(p for _, p in rows))})
    for (tokens, pictures), own in zip(rows, found.split(lengths, 1), strict=True):
        torch.testing.assert_close(own, decoder(tokens, media={"images": pictures}), rtol=0, atol=1e-10)


@torch.no_grad()
def test_padded_rows_fed_in_chunks_give_what_each_gives_alone(decoder: Decoder) -> None:
    """Left padding, a cache, and chunks whose borders lie inside pictures; then one more token each."""
    rows = [row(decoder, grids, 10 * i) for i, grids in enumerate(ROWS)]
    longest = max(tokens.shape[1] for tokens, _ in rows)
    padding = torch.tensor([longest - tokens.shape[1] for tokens, _ in rows])
    padded = torch.cat(
        [torch.cat((torch.zeros(1, n, dtype=torch.long), t), 1) for n, (t, _) in zip(padding, rows, strict=True)]
    )
    caches = decoder.new_caches(len(rows), longest + 1, padding=padding)
    found = prefill(decoder, padded, caches, 7, media={"images": together(*(p for _, p in rows))})
    then = prefill(decoder, text(3).view(3, 1), caches)
    for i, (tokens, pictures) in enumerate(rows):
        longer = torch.cat((tokens, text(3)[:, i : i + 1]), 1)
        alone = decoder(longer, media={"images": pictures})[0].float()
        torch.testing.assert_close(torch.stack((found[i], then[i])), alone[-2:], rtol=0, atol=1e-6)


def test_gradients_reach_the_image_side_through_a_frozen_language_model(decoder: Decoder) -> None:
    images: Any = decoder.images
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    for parameter in images.parameters():
        parameter.requires_grad_(True)
    tokens, pictures = row(decoder, [Grid(2, 1)], 0)
    decoder.nll(decoder.hidden(tokens[:, :-1], media={"images": pictures})[0], tokens[:, 1:]).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in images.parameters())
    assert all(p.grad is None for n, p in decoder.named_parameters() if not n.startswith("images."))


@torch.no_grad()
def test_the_single_tile_is_its_own_thumbnail(decoder: Decoder) -> None:
    """Encoded once; as if the same tile came twice."""
    images: Any = decoder.images
    given, calls = tiles(1), []
    images.vision.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    once = images(Pictures(given, [Grid(1, 1)]))
    features = images.projector(images.vision(given.repeat(2, 1, 1, 1)))
    s = images.tiling.side
    twice = torch.cat([images.tiling.newline.close(view) for view in features])
    assert calls[0] == 1
    torch.testing.assert_close(torch.cat((once[: s * (s + 1)], once[s * (s + 1) + 1 :])), twice, rtol=0, atol=1e-12)


def test_embeddings_of_text_are_scaled_and_those_of_pictures_are_not(tiny: Callable[..., Any]) -> None:
    plain, scaled = (compose(tiny(scale_embeddings=on, **SIGHT)) for on in (False, True))
    tokens, pictures = row(plain, [Grid(1, 1)], 0)
    one, other = (made.look_up(tokens, {"images": pictures}) for made in (plain, scaled))
    at = tokens == IMAGE
    assert torch.equal(one[at], other[at]) and torch.allclose(one[~at] * 48**0.5, other[~at])


# --- refusals ---------------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"images": {"name": "early_fusion"}}, "model.images.image_token"),
    ({"images": {"name": "early_fusion", "image_token": 61}}, "model.images.image_token"),
    ({"vision": None}, "model.vision"),
    ({"vision": {**TOWER, "norm": NORM}}, "model.vision.ffn"),
    ({"vision": {**SIGHT["vision"], "patch": 31}}, "model.vision.patch"),
    ({"vision": {**SIGHT["vision"], "n_heads": 5}}, "model.vision.n_heads"),
    ({"vision": {**SIGHT["vision"], "class_token": True}}, "model.vision.class_token"),
    ({"projector": {"name": "downsample_mlp", "ratio": 6}}, "model.projector.ratio"),
    ({"projector": "identity"}, "model.projector"),
    ({"tiling": {"name": "grid_2d", "max_tiles": 0}}, "model.tiling.max_tiles"),
    ({"tiling": {"name": "grid_2d", "global_view": "middle"}}, "model.tiling.global_view"),
    ({"mtp": {"depth": 1}}, "model.mtp"),
    ({"gating": {"name": "hash"}}, "model.gating"),
    ({"layout": {"vision": "siglip*"}}, "model.layout.vision"),
    ({"variants": {"tiling": {"a": "native"}}}, "model.variants.tiling"),
]


def test_what_cannot_work_is_refused_where_it_is_written(tiny: Callable[..., Any]) -> None:
    for changes, path in REFUSED:
        with pytest.raises(ConfigError) as caught:
            check(tiny(moe=True, **{**SIGHT, **changes}))
        assert caught.value.path.startswith(path), (changes, str(caught.value))


def test_places_and_embeddings_that_disagree_are_refused(decoder: Decoder, tiny: Callable[..., Any]) -> None:
    tokens, pictures = row(decoder, [Grid(2, 1)], 0)
    for wrong in (tokens[:, :-7], torch.cat((tokens, torch.full((1, 2), IMAGE)), 1)):
        with pytest.raises(BlockError, match="images"):
            decoder(wrong, media={"images": pictures})
    with pytest.raises(BlockError, match="images"):
        compose(tiny())(tokens, media={"images": pictures})
