"""Memory of one layer of DeepSeek-V2-Lite on a long sequence: one process against ranks that share the sequence.

``python -m benchmarks.context --tokens 32768``: forward and backward, fp32, over gloo. Each rank is a process of its
own, and its peak that of the operating system, without what it held before the layer was built. Weights are shared by
FSDP2, the experts of ``--ffn moe`` by expert parallelism. Also a check: losses agree.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

VOCABULARY = 1024  # little beside the layer
LAYER = {"n_layers": 1, "vocab_size": VOCABULARY}
DENSE = {**LAYER, "ffn": {"name": "swiglu", "d_ff": 10944}, "layout": None, "variants": None}
MOE = {**LAYER, "layout": None, "variants": None}


def peak() -> int:
    """Bytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank(tokens: int, ffn: str, seed: int = 0) -> dict[str, Any]:
    """Forward and backward of this process's share of a sequence."""
    import torch
    import torch.distributed as dist

    from blockwright.blocks.compose import compose
    from blockwright.registry import presets
    from blockwright.registry.layout import patched
    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.ranks import DataRanks, balance_over
    from blockwright.training.parallel.sizes import Sizes

    ranks = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    model = patched(presets.read("deepseek_v2_lite"), DENSE if ffn == "dense" else MOE)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (1, tokens + 1), generator=draw)
    share, before = None, peak()
    if ranks == 1:
        decoder = compose(model, seed=seed)
    else:
        dist.init_process_group("gloo")
        meshes = make_meshes(Sizes(context=ranks, expert=ranks if ffn == "moe" else 1), "cpu")
        decoder = build(model, seed, Sharding(meshes))
        assert meshes.context is not None
        share = meshes.context.share(tokens)
        everyone = DataRanks(ranks, dist.get_rank())
        balance_over(decoder, everyone, everyone)
    held, start = peak(), time.perf_counter()
    targets = ids[:, 1:] if share is None else share.take(ids[:, 1:])
    hidden, _ = decoder.hidden(ids[:, :-1], share=share)
    loss = decoder.nll(hidden, targets)
    forward = time.perf_counter() - start
    (loss * ranks / tokens).backward()
    seconds, total = time.perf_counter() - start, loss.detach().clone()
    if ranks > 1:
        dist.all_reduce(total)
        dist.destroy_process_group()
    found = {"peak": peak() - before, "built": held - before, "forward": forward, "seconds": seconds}
    return {**found, "loss": float(total) / tokens}


def measured(tokens: int, ffn: str, ranks: int) -> list[dict[str, Any]]:
    """Every rank's figures, from processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.context", "--one", "--tokens", str(tokens), "--ffn", ffn]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for each in range(ranks):
        environment = {**os.environ, **world, "RANK": str(each)}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{tokens:,} tokens on {ranks} ranks failed: {[process.returncode for process in started]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of the sequence; 2 × ranks divides it")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ffn", choices=("dense", "moe"), default="dense", help="of the layer")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(rank(given.tokens, given.ffn)))
        return
    alone = measured(given.tokens, given.ffn, 1)[0]
    print(f"{given.tokens:,} tokens, {given.ffn}: one process {_said([alone])}", flush=True)
    spread = measured(given.tokens, given.ffn, given.ranks)
    share = max(row["peak"] for row in spread) / alone["peak"]
    print(f"{given.ranks} ranks {_said(spread)}: {share:.3f} of one process's memory")
    result: dict[str, Any] = {"tokens": given.tokens, "ffn": given.ffn, "ranks": given.ranks, "share": share}
    result["about"] = machine.about("cpu", machine.cores())
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"context_{given.ffn}_{given.tokens}.json"
    path.write_text(json.dumps({**result, "alone": alone, "spread": spread}, indent=1) + "\n")
    print(path)


def _said(rows: list[dict[str, Any]]) -> str:
    most = {name: max(row[name] for row in rows) for name in ("peak", "seconds")}
    return f"{most['peak'] / 1e9:.2f} GB at most, {most['seconds']:.0f} s, loss {rows[0]['loss']:.6f}"


if __name__ == "__main__":
    main()
