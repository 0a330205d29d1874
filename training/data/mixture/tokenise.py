"""``blockwright tokenise FILES OUT``: text to shards of tokens for ``data=mixture``, by several processes.

FILES are paths and globs of .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt and .md; each becomes a shard. The
same command continues a job that was stopped. OUT/index.json has tokens, documents, bytes and SHA-256 of each shard.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from blockwright.registry.command import Parser, run_command
from blockwright.registry.errors import ConfigError
from blockwright.training.data.corpus import expand
from blockwright.training.data.mixture.writing import FORMATS, Job
from blockwright.training.data.tokenizers.pretrained import Pretrained
from blockwright.training.data.tokenizers.tokenizer import Bytes, Tokenizer

BYTES = "bytes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(prog="blockwright tokenise", description=__doc__)
    parser.add_argument("files", metavar="FILES", nargs="+", help="paths or globs of text")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the shards: new, or of the same job")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json, or bytes")
    parser.add_argument("--eos", help="the word that ends a document; usually the files beside tokenizer.json name it")
    parser.add_argument("--column", default="text", help="of a record that has the text (text)")
    parser.add_argument("--format", choices=[*FORMATS], default="flat", help="flat, or megatron: .bin and .idx")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="one for each core is the most useful"
    )
    given = parser.parse_args(arguments)
    if given.processes < 1:
        raise ConfigError("--processes", given.processes, "counts processes, at least 1", "Leave it out for all cores")
    files = sorted({file for pattern in given.files for file in expand(pattern, "FILES")})
    job = Job(files, given.out, _tokenizer(given.tokenizer, given.eos), given.column, given.format)
    with job.alone():
        _follow(job, given.processes)
        shards = job.conclude()
    tokens, n_bytes = (sum(shard[key] for shard in shards.values()) for key in ("tokens", "bytes"))
    if not tokens:
        raise ConfigError("FILES", given.files, "have no text", "Name others, or the column: --column NAME")
    if repaired := sum(shard["repaired"] for shard in shards.values()):
        print(f"{repaired:,} documents hold half of a surrogate pair, written as U+FFFD", file=sys.stderr)
    print(f"{len(shards):,} shards, {tokens:,} tokens, {n_bytes / tokens:.2f} bytes a token: {given.out}")
    print(f"Train on it: blockwright train data=mixture 'data.sources={{text: {{files: {given.out}/*.bin}}}}' …")


def _tokenizer(name: str, eos: str | None) -> Tokenizer:
    return Bytes() if name == BYTES else Pretrained(name, eos)


def _follow(job: Job, processes: int) -> None:
    """Run a job, with a line of progress for each finished file, at most one a second."""
    sizes = [file.stat().st_size for file in job.files]
    done, before = set(job.finished()), sum(sizes[number] for number in job.finished())
    if done:
        print(f"continues: {len(done):,} of {len(sizes):,} files are done", file=sys.stderr)
    began, shown = time.monotonic(), 0.0
    for number, _ in job.run(processes):
        done.add(number)
        now = time.monotonic()
        if now - shown < 1 and len(done) < len(sizes):
            continue
        shown, read = now, sum(sizes[n] for n in done)
        left = (sum(sizes) - read) * (now - began) / max(read - before, 1)
        print(f"{len(done):,} of {len(sizes):,} files, {read / 1e6:,.0f} MB, {_time(left)} left", file=sys.stderr)


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 3600
        else f"{seconds / 60:.0f} min"
        if seconds > 60
        else f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
