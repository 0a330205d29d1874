"""The memory of the plan is that of a simulated world."""

from __future__ import annotations

import resource
import time

import pytest

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.memory import memory
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.build import Sharding, build
from blockwright.training.parallel.imagined import _kept, ranks, spread_over
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.sizes import Sizes


@pytest.mark.slow
def test_all_of_deepseek_v2_on_a_thousand_ranks_takes_seconds() -> None:
    model = preset("deepseek_v2", {"gating": {"n_groups": 32, "balance": None}})
    sizes, start = Sizes(shard=1024, expert=32), time.process_time()
    with ranks(sizes.world):
        decoder = build(model, 0, Sharding(make_meshes(sizes, "cpu")), shapes_only=True)
        held = [spread_over(sizes, tensors) for tensors in _kept(decoder, AdamW())]
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2e6
    parts = memory(measure(compose(model, device="meta")), Job(1024, 1024, 4096), Layout(expert=32, shard=True))
    assert parts["parameters"] == max(held[0]) and parts["optimizer"] == pytest.approx(max(held[2]), rel=1e-9)
