"""A trillion tokens in sparse files: the first batch comes at once, and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LATE = """
import json, resource, sys, time
import numpy as np
from pathlib import Path
from blockwright.training.data.mixture.order import MixtureOrder
from blockwright.training.data.mixture.shards import Reading, open_shard
from blockwright.training.data.mixture.shares import Schedule, Stage
from blockwright.training.data.mixture.tokens import Rings, Shards
from blockwright.training.data.mixture.windows import MixtureWindows
from blockwright.training.data.windows import Making

before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
reading = Reading("data.sources.web.files", 256, dtype="uint16", documents="eos")
sources = {
    name: Shards([open_shard(file, reading) for file in sorted(Path(sys.argv[1]).glob(f"{name}_*.bin"))])
    for name in ("code", "web")
}
schedule = Schedule((Stage({"code": 3, "web": 7}, 1_000_000), Stage({"code": 6, "web": 4})), 256)
order = MixtureOrder(schedule, tuple(tokens.n_tokens for tokens in sources.values()), 4096, 0, 2_000_000)
_, rows = next(iter(order.batches(1_500_000, 1_500_001)))
windows = MixtureWindows(Rings(sources, 257, "{name}"), 4096, np.ones(257, np.int64), 256, Making())
batch = windows.__getitems__(rows.tolist()[:8])
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
seconds, shape = time.process_time() - began, list(batch["tokens"].shape)
print(json.dumps({"seconds": seconds, "megabytes": used / 1024, "shape": shape}))
"""


@pytest.mark.slow
def test_a_trillion_tokens(tmp_path: Path):
    for name, n in (("web", 35), ("code", 15)):
        for i in range(n):
            with (tmp_path / f"{name}_{i:02}.bin").open("wb") as file:
                os.truncate(file.fileno(), 2 * 20 * 10**9)
    done = subprocess.run([sys.executable, "-c", LATE, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["shape"] == [8, 4096]
    assert measured["seconds"] < 2 and measured["megabytes"] < 200
