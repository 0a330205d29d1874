"""Each rank draws the part of a weight that it holds, scaled or not; the parts are the whole draw, bit-identical."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from many_ranks import DEEPSEEK, DENSE, GPT, MOE, Descent, far, read_model, spawn, train

from blockwright.blocks.compose import compose
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parametrisations import Width

BUILT: list[tuple[dict[str, int], str]] = [
    *(({"shard": 4}, text) for text in (DENSE, GPT)),
    *(({"shard": 2, "tensor": 2}, text) for text in (GPT, DEEPSEEK)),
    ({"shard": 4, "expert": 2}, MOE),
    ({"shard": 2, "tensor": 2, "expert": 2}, DEEPSEEK),
]
# Rows that neither two nor eight ranks share evenly, split by tensor and then in shards: each rank's are strided.
UNEVEN = GPT.replace("vocab_size: 40", "vocab_size: 41").replace("d_ff: 48", "d_ff: 44")
ON_EIGHT: list[tuple[dict[str, int], str]] = [
    ({"shard": 4, "tensor": 2}, UNEVEN),
    ({"replicate": 2, "shard": 2, "tensor": 2}, UNEVEN),
    ({"shard": 4, "tensor": 2, "expert": 4}, DEEPSEEK),
]
pytestmark = pytest.mark.xdist_group("own_draws")


def build_all(cases: list[tuple[dict[str, int], str]]) -> list[dict[str, Any]]:
    """Build in memory that holds NaN until something is written."""
    from blockwright.blocks import initialise
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

    initialise._skips()
    torch.Tensor.normal_ = counted  # type: ignore[method-assign,assignment]
    torch.use_deterministic_algorithms(True)  # which fills what ``torch.empty`` gives
    for sizes, text in cases:
        drawn.clear()
        decoder = build(read_model(text), 3, Sharding(make_meshes(Sizes(**sizes), "cpu")))
        count = sum(drawn)
        state = {name: whole(t.detach()) for name, t in decoder.state_dict().items()}
        right = compose(text, seed=3).state_dict()
        apart = [name for name, t in right.items() if not torch.equal(state[name], t)]
        matrices = sum(t.numel() for t in right.values() if t.ndim > 1)
        found.append({"sizes": sizes, "apart": apart, "share": count / matrices})
    return found


@pytest.mark.slow
def test_parts_are_the_whole_draw_and_no_rank_draws_all() -> None:
    for ranks in spawn(4, build_all, BUILT):
        for case in ranks:
            assert case["apart"] == [], case
            assert case["share"] < (0.4 if case["sizes"] == {"shard": 4} else 0.8), case


@pytest.mark.slow
def test_uneven_and_strided_shards_on_eight_ranks_start_and_train_as_one_process_does() -> None:
    for ranks in spawn(8, build_all, ON_EIGHT):
        assert all(case["apart"] == [] for case in ranks), ranks
    alone = train(UNEVEN, optimizer=Descent(), steps=2)
    for strategy in ({"tensor": 2}, {"tensor": 2, "replicate": 2}):
        first, *_ = spawn(8, partial(train, UNEVEN, strategy=strategy, devices=8, optimizer=Descent(), steps=2))
        assert max(far(first, alone)) < 1e-5


SCALED = [{"shard": 2}, {"tensor": 2}, {"expert": 2, "shard": 2}]


def starts_and_rates() -> list[dict[str, Any]]:
    import torch

    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.local import whole
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.sizes import Sizes

    found = []
    for sizes in SCALED:
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
