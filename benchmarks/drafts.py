"""Speed of generation with drafts and without: ``python -m benchmarks.drafts RUN [--small RUN] [--repeats N]``.

Continuations of the same prompts by the same seeds, alternated, in CPU-seconds of this process: its ratios hold on a
machine that others use. Every text with drafts is compared with the one without; a difference ends the script. Prints
a table in Markdown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from blockwright.blocks.generation.drafts import Drafter
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Acceptance, Sampling
from blockwright.blocks.generation.speculation import Speculation
from blockwright.lab.generate import drafter
from blockwright.lab.writer import Writer

PROMPTS = ("import os\n\ndef read(path):\n", 'class Node:\n    """A ')
SAMPLINGS = {"greedy": Sampling(0.0), "t=1": Sampling(1.0), "t=0.8, top-p 0.9": Sampling(0.8, top_p=0.9)}


class Timed(NamedTuple):
    """A text, its CPU-seconds and what became of drafts."""

    text: list[int | None]
    seconds: float
    acceptance: Acceptance


def timed(writer: Writer, prompt: str, n: int, sampling: Sampling, seed: int, drafts: Drafter | None) -> Timed:
    ids, begun = [writer.encode(prompt)], time.process_time()
    if drafts is None:
        text = [tokens[0] for tokens in Continuations(writer.decoder, ids, n, sampling, seed=seed)]
        return Timed(text, time.process_time() - begun, Acceptance())
    rows = Speculation(writer.decoder, ids, n, sampling, seed=seed, drafts=drafts)
    return Timed([tokens[0] for tokens in rows], time.process_time() - begun, rows.acceptance)


def compared(writer: Writer, kinds: dict[str, Drafter], n: int, repeats: int) -> None:
    """Print a line for each sampling and kind of drafts."""
    print("| sampling | drafts | tokens/CPU-s | against none (least to most) | accepted | tokens a pass |")
    print("|---|---|---:|---:|---:|---:|")
    for name, sampling in SAMPLINGS.items():
        found: dict[str, list[Timed]] = {kind: [] for kind in ("none", *kinds)}
        for seed in range(repeats):
            for prompt in PROMPTS:
                for kind in found:
                    found[kind].append(timed(writer, prompt, n, sampling, seed, kinds.get(kind)))
        for kind, runs in found.items():
            if any(run.text != none.text for run, none in zip(runs, found["none"], strict=True)):
                raise SystemExit(f"{name}, {kind}: a text differs from that without drafts")
            print(row(name, kind, runs, found["none"]), flush=True)


def row(name: str, kind: str, runs: Sequence[Timed], none: Sequence[Timed]) -> str:
    speed = statistics.median(len(run.text) / run.seconds for run in runs)
    ratios = [base.seconds / run.seconds for run, base in zip(runs, none, strict=True)]
    passes, drafted, accepted = (
        sum(getattr(run.acceptance, part) for run in runs) for part in ("passes", "drafted", "accepted")
    )
    total = Acceptance(passes, drafted, accepted)
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    share = f"{total.share:.2f}" if drafted else "–"
    return f"| {name} | {kind} | {speed:.0f} | {ratio} | {share} | {total.tokens_a_pass:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a trained model with multi-token prediction")
    parser.add_argument("--small", help="a smaller model of the same tokenizer")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    writer = Writer.open(options.run)
    depths = len(writer.decoder.mtp)
    kinds = {f"mtp, {k} a pass": drafter(writer, "mtp", k) for k in range(1, depths + 1)}
    kinds["lookup"] = drafter(writer, "lookup")
    if options.small:
        kinds["smaller model, 3 a pass"] = drafter(writer, options.small, 3)
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}\n")
    compared(writer, kinds, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
