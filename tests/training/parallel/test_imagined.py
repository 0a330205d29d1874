"""A world imagined in one process holds and moves what its ranks would, and no rank holds more than its share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_ranks import read_model

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.build import Sharding, build
from blockwright.training.parallel.dry_run import _kept, imagine, ranks, spread_over
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


@pytest.mark.slow
def test_the_dry_run_prints_every_rank_and_the_plan(checked: Callable[..., Any], capsys: Any) -> None:
    ask = ["trainer=fsdp", "trainer.dry_run=true", "data.batch_size=96", "data.eval_batch_size=96", "optimizer=adamw"]
    figures = imagine(checked(*ask, "trainer.world=96"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:5] == ["dry", "run:", "96", "imagined", "ranks,"]
    fullest, plan = lines[2][1:], lines[-1][3:]
    assert fullest == plan and figures["dry_run/optimizer_bytes"] == 2 * figures["dry_run/parameters_bytes"]


def test_worlds_that_cannot_be_are_refused(checked: Callable[..., Any]) -> None:
    for other in ("trainer=fsdp", "trainer.dry_run=true"):
        with pytest.raises(ConfigError):
            checked("trainer.world=8", other)


# Each rank in a process of its own, so that its peak is its own. 263 million parameters in fp32, 1.05 GB.
PROGRAM = """
import json, resource, sys
import torch
import torch.distributed as dist
from blockwright.training.parallel.build import Sharding, build
from blockwright.training.parallel.meshes import make_meshes
from blockwright.training.parallel.sizes import Sizes

MODEL = '''
vocab_size: 16384
d_model: 1024
n_layers: 19
tie_embeddings: true
attention: {name: mha, n_heads: 8}
position: rope
ffn: {name: swiglu, d_ff: 2816}
norm: rmsnorm
residual: prenorm
'''
torch.set_num_threads(1)
dist.init_process_group("gloo")
sizes = Sizes(**json.loads(sys.argv[1]))
def kilobytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = kilobytes()
decoder = build(MODEL, 0, Sharding(make_meshes(sizes, "cpu")))
held = sum(p.to_local().nbytes for p in decoder.parameters())
total = sum(p.numel() * p.element_size() for p in decoder.parameters())
told = {"before": before * 1024, "peak": kilobytes() * 1024, "held": held, "model": total}
rows = [None] * dist.get_world_size()
dist.all_gather_object(rows, told)
if dist.get_rank() == 0:
    print(json.dumps(rows))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_building_a_gigabyte_on_two_ranks_peaks_at_a_share_and_half_a_gigabyte(environment, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "program.py", json.dumps({"shard": 2})],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for row in json.loads(done.stdout.splitlines()[-1]):
        assert row["model"] > 1.0e9 and row["held"] == pytest.approx(row["model"] / 2, rel=0.04)
        assert row["peak"] < row["held"] + 0.5e9, row
