"""No rank ever holds more of a model than its share and one part of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each rank in a process of its own, so that its peak is its own. 510 million parameters in fp32, 2.04 GB.
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
n_layers: 38
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
def test_building_two_gigabytes_on_two_ranks_peaks_at_a_share_and_half_a_gigabyte(
    environment: dict[str, str], tmp_path: Path
) -> None:
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
        assert row["model"] > 2.0e9 and row["held"] == pytest.approx(row["model"] / 2, rel=0.04)
        assert row["peak"] < row["held"] + 0.5e9, row
