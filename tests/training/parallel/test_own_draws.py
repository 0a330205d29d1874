"""Each rank draws the part of a weight that it holds, and the parts together are the whole draw, bit-identical."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from many_ranks import DEEPSEEK, DENSE, GPT, MOE, read_model, spawn

from blockwright.blocks.compose import compose

SIZES = [{"shard": 4}, {"shard": 2, "tensor": 2}, {"shard": 4, "expert": 2}, {"shard": 2, "tensor": 2, "expert": 2}]
pytestmark = pytest.mark.xdist_group("own_draws")


def build_all() -> list[dict[str, Any]]:
    from blockwright.blocks import skipping
    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.local import whole
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.sizes import Sizes

    found = []
    drawn: list[int] = []
    normal = torch.Tensor.normal_

    def counted(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(self.numel())
        return normal(self, *arguments, **options)

    skipping._skips()
    torch.Tensor.normal_ = counted  # type: ignore[method-assign,assignment]
    for sizes in SIZES:
        meshes = make_meshes(Sizes(**sizes), "cpu")
        for text in (DEEPSEEK, MOE) if "expert" in sizes else (DENSE, GPT, DEEPSEEK):
            drawn.clear()
            decoder = build(read_model(text), 3, Sharding(meshes))
            count = sum(drawn)
            state = {name: whole(t.detach()) for name, t in decoder.state_dict().items()}
            right = compose(text, seed=3).state_dict()
            apart = [name for name, t in right.items() if not torch.equal(state[name], t)]
            matrices = sum(t.numel() for t in right.values() if t.ndim > 1)
            found.append({"sizes": sizes, "apart": apart, "share": count / matrices})
    return found


@pytest.mark.slow
def test_parts_are_the_whole_draw_and_no_rank_draws_all() -> None:
    for ranks in spawn(4, build_all):
        for case in ranks:
            assert case["apart"] == [], case
            assert case["share"] < (0.4 if case["sizes"] == {"shard": 4} else 0.8), case
