"""What is raced has the sizes that it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contender import contenders
from benchmarks.models.base import build
from benchmarks.models.blockwright import cache_formula
from benchmarks.shapes import FAMILIES, SHAPES, TOLERANCE, Family, composition
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import count_parameters


def test_small_has_seventy_two_million_parameters_of_which_thirty_are_active() -> None:
    found = count_parameters(compose(composition(SHAPES["small"], "mla_moe"), device="meta"))
    assert round(found.total / 1e6, 1) == 72.0
    assert round((found.active - found.embedding) / 1e6, 1) == 30.1


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "smoke"])
def test_families_of_a_shape_have_one_active_size(shape: str) -> None:
    active = []
    for family in FAMILIES:
        found = count_parameters(compose(composition(SHAPES[shape], family), device="meta"))
        active.append(found.active - found.embedding)
    assert max(active) / min(active) - 1 <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_holds_what_the_formula_says(family: Family, dtype: torch.dtype) -> None:
    shape = SHAPES["smoke"]
    decoder = compose(composition(shape, family)).to(dtype)
    held = sum(cache.nbytes for cache in decoder.new_caches(3, 17))
    assert held == cache_formula(shape, family, 3, 17, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_parameters_of_ours(family: Family) -> None:
    found = [c for c in contenders(family, older=True) if c.maker in ("ours", "transformers") and c.tuned]
    models = [build(c, SHAPES["smoke"], "fp32", "cpu") for c in found]
    assert len({sum(p.numel() for p in model.module.parameters()) for model in models}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_other_peers_have_the_parameters_of_ours(family: Family) -> None:
    pytest.importorskip("litgpt")
    pytest.importorskip("x_transformers")
    sizes = {}
    for contender in contenders(family):
        model = build(contender, SHAPES["tiny"], "fp32", "cpu")
        sizes[contender.label] = sum(p.numel() for p in model.module.parameters())
    assert max(sizes.values()) / min(sizes.values()) - 1 <= TOLERANCE, sizes


def test_every_family_races_ours_and_transformers_at_both_settings() -> None:
    for family in FAMILIES:
        labels = [c.label for c in contenders(family)]
        assert len(set(labels)) == len(labels)
        for library in ("ours", "transformers", "litgpt"):
            assert sum(label.startswith(f"{library} ") for label in labels) == 2
