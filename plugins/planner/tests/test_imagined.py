"""What the planner counts is what the ranks of an imagined world hold and move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import Counted
from many_ranks import DEEPSEEK, read_model

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.memory import memory
from blockwright.plugins.planner.traffic import traffic
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.build import Sharding, build
from blockwright.training.parallel.imagined import _kept, ranks, spread_over
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.sizes import Sizes


@pytest.mark.slow
def test_deepseek_v2s_first_layers_on_a_thousand_ranks_are_what_the_planner_says() -> None:
    changes: dict[str, Any] = {"n_layers": 3, "gating": {"n_groups": 32, "balance": None}}
    model, sizes = preset("deepseek_v2", changes), Sizes(shard=1024, expert=32)
    with ranks(sizes.world):
        decoder = build(model, 0, Sharding(make_meshes(sizes, "cpu")), shapes_only=True)
        kept = [spread_over(sizes, tensors) for tensors in _kept(decoder, AdamW())]
    measured = measure(compose(model, device="meta"))
    parts = memory(measured, Job(1024, 1024, 4096), Layout(expert=32, shard=True))
    planned = [parts[name] for name in ("parameters", "gradients", "optimizer")]
    assert planned == pytest.approx([max(spread) for spread in kept], rel=1e-9)
    assert planned == pytest.approx([sum(spread) / 1024 for spread in kept], rel=0.03)
    assert max(kept[0]) / 4 == pytest.approx(9.135e6, rel=1e-4)


@pytest.mark.slow
def test_a_step_puts_through_a_rank_what_the_planner_says() -> None:
    sizes = Sizes(shard=2, tensor=2)
    model = read_model(DEEPSEEK)
    job = Job(sizes.world, 2 * sizes.shard, 12)
    layout = Layout(tensor=sizes.tensor, expert=sizes.tensor, shard=True, micro_batch=2)
    with ranks(sizes.world):
        decoder = build(model, 0, Sharding(make_meshes(sizes, "cpu")))
        tokens = torch.zeros(2, 12, dtype=torch.long)
        with Counted() as counted:
            decoder.nll(decoder.hidden(tokens)[0], tokens).backward()
    planned = traffic(measure(compose(model, device="meta")), job, layout, 4, 4, 4)
    assert dict(counted.bytes) == {kind: value for kind, value in planned.items() if value}
