"""Under rules of width every rank starts from its part of the scaled weights, and has the rates of one process."""

from __future__ import annotations

from typing import Any

import pytest
from many_ranks import DEEPSEEK, GPT, read_model, spawn

from blockwright.blocks.compose import compose
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parametrisations.width import Width

SIZES = [{"shard": 2}, {"tensor": 2}, {"expert": 2, "shard": 2}]
pytestmark = pytest.mark.xdist_group("own_draws")


def starts_and_rates() -> list[dict[str, Any]]:
    import torch

    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.local import whole
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.sizes import Sizes

    found = []
    for sizes in SIZES:
        for text in (GPT, DEEPSEEK):
            model = compose(text, device="meta").config
            recipe = AdamW()
            scaled = recipe.scaled(Width({"d_model": 16}, model).scales(recipe))
            right = compose(text, seed=3, scales=scaled.scales)
            decoder = build(read_model(text), 3, Sharding(make_meshes(Sizes(**sizes), "cpu")), scales=scaled.scales)
            state = {name: whole(t.detach()) for name, t in decoder.state_dict().items()}
            apart = [name for name, t in right.state_dict().items() if not torch.equal(state[name], t)]
            found.append({"sizes": sizes, "apart": apart, "alike": _rates(scaled, decoder) == _rates(scaled, right)})
    return found


def _rates(recipe: AdamW, decoder: Any) -> dict[str, float]:
    names = {id(p): name for name, p in decoder.named_parameters()}
    return {names[id(p)]: g["lr"] for g in recipe.build(decoder).param_groups for p in g["params"]}


@pytest.mark.slow
def test_ranks_start_from_the_scaled_weights_at_the_same_rates() -> None:
    for ranks in spawn(2, starts_and_rates):
        for case in ranks:
            assert case["apart"] == [], case
            assert case["alike"], case
