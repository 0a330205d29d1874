"""A world imagined in one process holds and moves what its ranks would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from many_ranks import read_model

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.build import Sharding, build
from blockwright.training.parallel.imagined import _kept, _runs, imagine, ranks, spread_over
from blockwright.training.parallel.local import plain
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.sizes import Sizes

UNEVEN = """
vocab_size: 61
d_model: 24
n_layers: 2
max_positions: 64
attention: {name: mla, n_heads: 4, q_lora_rank: 10}
position: rope
ffn: {name: moe, n_experts: 4, shared: {name: swiglu, d_ff: 20}}
gating: {name: softmax_topk, top_k: 2}
experts: {name: swiglu, d_ff: 11}
norm: rmsnorm
residual: prenorm
"""  # widths that ranks do not divide
WORLDS = {
    "fsdp": Sizes(shard=8),
    "hsdp and experts": Sizes(replicate=2, shard=4, expert=2),
    "tensor and experts": Sizes(shard=6, tensor=2, expert=2),
    "context and experts": Sizes(shard=2, context=2, tensor=2, expert=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_every_rank_is_said_to_hold_what_it_holds_when_it_is_built(name: str) -> None:
    sizes, said = WORLDS[name], []
    for rank in range(sizes.world):
        with ranks(sizes.world, rank):
            decoder = build(read_model(UNEVEN), 0, Sharding(make_meshes(sizes, "cpu")), shapes_only=True)
            assert all(p.is_meta for p in decoder.parameters())
            kept = _kept(decoder, AdamW())
            said = said or [spread_over(sizes, tensors) for tensors in kept]
            for tensors, spread in zip(kept, said, strict=True):
                assert spread[rank] == sum(plain(t).numel() * t.element_size() for t in tensors)
    assert len(set(said[0])) > 1  # rows do not divide
    if name == "fsdp":
        assert sum(said[0]) == 4 * sum(p.numel() for p in compose(UNEVEN, device="meta").parameters())


def test_runs_of_ranks_are_written_short() -> None:
    assert _runs([0, 1, 2, 7]) == "0–2, 7"
    assert _runs([0, 2, 4, 6, 8]) == "0, 2, 4, … (5 in all)"


@pytest.mark.slow
def test_the_dry_run_prints_every_rank_and_the_plan(checked: Callable[..., Any], capsys: Any) -> None:
    ask = ["trainer=fsdp", "trainer.dry_run=true", "data.batch_size=96", "data.eval_batch_size=96", "optimizer=adamw"]
    figures = imagine(checked(*ask, "trainer.world=96"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:5] == ["dry", "run:", "96", "imagined", "ranks,"]
    fullest, plan = lines[2][1:], lines[-1][3:]
    assert fullest == plan and figures["dry_run/optimizer_bytes"] == 2 * figures["dry_run/parameters_bytes"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer=fsdp", "trainer.world=8"], "imagines ranks for a dry run"),
        (["trainer.world=8", "trainer.dry_run=true"], "here each has all of it"),
    ],
)
def test_worlds_that_cannot_be_are_refused(overrides: list[str], said: str, checked: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(*overrides)
