"""Memory, traffic and step time of a layout, as this project's own plans and simulated ranks count them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from counting import Counted
from many_ranks import DEEPSEEK, read_model
from quickest import takes_less

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.planner.hardware import coefficients, hardware
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.memory import memory, reached, traffic
from blockwright.plugins.planner.search import CHOICES, search
from blockwright.plugins.planner.step import collective, step
from blockwright.plugins.planner.table import losses
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.arithmetic import held_bytes
from blockwright.training.parallel.arithmetic import traffic as planned
from blockwright.training.parallel.build import Sharding, build
from blockwright.training.parallel.dry_run import _kept, ranks, spread_over
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.sizes import Sizes

JOB = Job(gpus=16, batch=64, length=256)
SIZES = {
    "fsdp": (Layout(shard=True), Sizes(shard=16)),
    "tp_ep": (Layout(tensor=2, expert=8, shard=True, micro_batch=2), Sizes(shard=8, tensor=2, expert=4)),
    "cp_tp_ep": (Layout(context=2, tensor=2, expert=8, shard=True), Sizes(shard=4, tensor=2, expert=4, context=2)),
}


@pytest.fixture(scope="module")
def lite() -> Any:
    return measure(compose(preset("deepseek_v2_lite", {"n_layers": 2}), device="meta"))


@pytest.fixture(scope="module")
def large() -> Any:
    return measure(compose(preset("deepseek_v2"), device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "cp_tp_ep"])
def test_a_rank_holds_and_moves_what_this_projects_plan_says(name: str, lite: Any) -> None:
    layout, sizes = SIZES[name]
    assert layout.sizes(JOB) == sizes
    held, decoder = held_bytes(lite.decoder, sizes, AdamW()), lite.decoder
    parts = memory(lite, JOB, layout)
    assert parts["parameters"] == held["parameters"] and parts["gradients"] == held["gradients"]
    assert parts["optimizer"] == pytest.approx(held["optimizer"], rel=1e-9)
    tokens = layout.micro_batch * JOB.length // layout.context
    rows = tokens * reached(lite, layout.expert) / layout.tensor
    here = planned(decoder, sizes, tokens, rows)
    ours = traffic(lite, JOB, layout, weight_bytes=4, gradient_bytes=4, state_bytes=4)
    for kind in ("all_gather", "reduce_scatter"):  # counted apart there
        ours[kind] += ours["context"] / 2
    for kind, value in here.items():
        assert ours[kind] == pytest.approx(layout.micro_batches(JOB) * value, rel=1e-9), kind


@pytest.mark.slow
def test_a_layer_of_deepseek_v2_at_128k_fits_eight_gpus_that_share_the_sequence() -> None:
    layer = measure(compose(preset("deepseek_v2", {"n_layers": 1, "layout": {"ffn": "ffn*"}}), device="meta"))
    job, device = Job(gpus=8, batch=1, length=131072), hardware("h100")
    shared = Layout(context=8, expert=8, shard=True)
    assert shared.runs_here() and sum(memory(layer, job, shared).values()) < 0.9 * device.memory
    alone = memory(layer, replace(job, gpus=1), Layout(shard=True))
    assert sum(alone.values()) > 0.9 * device.memory
    layouts = (shared, replace(shared, context=1, micro_batch=1))
    more, fewer = (memory(layer, job, layout)["gathered"] for layout in layouts)
    assert more - fewer == 2 * 131072 * 576 + 4 * 2**28  # latents in bf16, and some heads' keys and values
    assert traffic(layer, job, shared)["context"] == 2 * 2 * 131072 * 576  # gathered, and sent back as gradients
    found = search(layer, job, device, coefficients(), {**CHOICES, "pipeline": (1,), "shard": (True,)})
    assert found.here is not None and found.here.layout.context > 1


def test_without_fsdp_the_optimizer_state_alone_is_spread(lite: Any) -> None:
    numbers = sum(p.numel() for p in lite.decoder.parameters())
    parts = memory(lite, JOB, Layout(pipeline=2))
    assert parts["parameters"] == numbers and parts["gradients"] == 2 * numbers  # a half, in bf16 and in fp32
    assert parts["optimizer"] == pytest.approx(12 * numbers / 2 / 8, rel=1e-5)


def test_recomputation_keeps_less_and_takes_longer(lite: Any) -> None:
    kept, seconds = [], []
    for recompute in ("none", "selective", "full"):
        layout = Layout(recompute=recompute)
        kept.append(memory(lite, JOB, layout)["activations"])
        seconds.append(step(lite, JOB, layout, hardware("h100"), coefficients()).seconds)
    assert kept[0] > kept[1] > kept[2] and seconds[0] < seconds[1] < seconds[2]


def test_collectives_run_over_nvlink_inside_an_island_and_over_all_its_nics_between_islands() -> None:
    device = replace(hardware("h100"), nvlink=100.0, nic=10.0, island=8)
    assert collective(device, 800.0, 1, 1) == 0
    assert collective(device, 800.0, 8, 1) == pytest.approx(7)
    assert collective(device, 800.0, 16, 1) == pytest.approx(8)  # 800 by NVLink hides 400 over 8 NICs
    assert collective(device, 800.0, 64, 1) == pytest.approx(800 * 56 / 64 / 80)
    assert collective(device, 800.0, 4, 8) == pytest.approx(800 * 3 / 4 / 10)  # one rank in each island


@pytest.mark.slow
def test_a_pipelines_bubble_is_its_formula(large: Any) -> None:
    job = Job(gpus=1024, batch=9216, length=4096)
    layout = Layout(pipeline=16, expert=8)
    parts = step(large, job, layout, hardware("h800"), coefficients()).parts
    once = {"pipeline bubble", "gradients", "optimizer"}
    busy = sum(seconds for name, seconds in parts.items() if name not in once)
    assert parts["pipeline bubble"] == pytest.approx(busy * 15 / (9216 / 64))
    half = step(large, job, replace(layout, schedule="zero_bubble"), hardware("h800"), coefficients()).parts
    assert half["pipeline bubble"] == pytest.approx(parts["pipeline bubble"] / 2)


@pytest.mark.slow
def test_ten_thousand_layouts_are_ranked_in_seconds(large: Any) -> None:
    job, searches = Job(gpus=1024, batch=9216, length=4096), []
    experts = (1, 2, 4, 8, 10, 16, 20, 32, 40, 80, 160)
    wide = {"micro_batch": (1, 2, 3, 4, 6, 8), "interleave": (1, 2, 3, 4, 5, 6, 15), "expert": experts}
    assert takes_less(10, lambda: searches.append(search(large, job, hardware("h800"), coefficients(), wide)))
    found = searches[-1]
    assert found.considered > 10_000
    speeds = [c.speed for c in found.best]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 5
    assert all(sum(c.memory.values()) <= 72e9 for c in found.best)
    layouts = [c.layout for c in found.best]
    assert len({(each.tensor, each.pipeline, each.context, each.expert, each.shard) for each in layouts}) == 5
    worst = found.best[-1]
    by_part = sum(losses(worst, found.best[0]).values())
    assert by_part == pytest.approx(worst.step.seconds - found.best[0].step.seconds)
    assert found.here is not None and found.here.layout.runs_here()


@pytest.mark.slow
def test_chosen_sizes_are_kept_to_and_what_cannot_be_is_refused(large: Any) -> None:
    fitted, device = coefficients(), hardware("h800")
    job = Job(gpus=256, batch=2304, length=4096)
    first = {**{k: v[:1] for k, v in CHOICES.items()}, "shard": (True,), "expert": (32,), "recompute": ("full",)}
    found = search(large, job, device, fitted, first)
    assert [str(c.layout) for c in found.best] == ["ep32 fsdp mb1 recompute full"]
    with pytest.raises(ConfigError, match="GB a GPU"):
        search(large, Job(8, 8, 4096), device, fitted, {"tensor": (1,), "expert": (8,), "context": (1,)})
    with pytest.raises(ConfigError, match=r"n_experts = 160"):
        search(large, Job(64, 64, 4096), device, fitted, {"expert": (64,), "tensor": (1,)})


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
