"""What a pass over several tokens costs against one over one token: ``python -m benchmarks.passes``.

Speculative decoding checks drafts in such passes. A decoder of 12 layers of width 512, not trained, reads 1, 2 and 3
tokens behind a context, in turn: the cache is marked, the tokens go through the layers and the head, and the first is
kept. CPU-seconds of this process; ratios are of the same round. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest

ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"name": "gqa", "n_heads": 8, "n_kv_heads": 2},
    "mla": {"name": "mla", "n_heads": 8},
    "gated_delta": {"name": "gated_delta", "n_heads": 8},
}
AROUND: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 512,
    "n_layers": 12,
    "max_positions": 4096,
    "ffn": {"name": "swiglu", "d_ff": 1408},
    "norm": "rmsnorm",
    "residual": "prenorm",
    "position": "rope",
}
TOKENS = (1, 2, 3)


def timed(decoder: Decoder, caches: Sequence[Cache], n: int) -> float:
    """CPU-seconds of a pass over n tokens, of which the first is kept where there are several."""
    tokens, begun = torch.arange(n)[None], time.process_time()
    marks = [cache.mark(n) for cache in caches] if n > 1 else []
    decoder.logits(decoder.hidden(tokens, caches=caches)[0])
    for cache, mark in zip(caches, marks, strict=False):
        cache.rewind(mark, torch.ones(1, dtype=torch.int64))
    return time.process_time() - begun


@torch.inference_mode()
def measured(attention: str, context: int, rounds: int) -> list[dict[int, float]]:
    """CPU-seconds of a pass over each number of tokens, round by round."""
    decoder = compose({**AROUND, "attention": ATTENTIONS[attention]}, seed=0).choose_kernels().eval()
    multiply_fastest(decoder)
    caches = decoder.new_caches(1, context + (rounds + 1) * len(TOKENS) + max(TOKENS))
    decoder.hidden(torch.arange(context)[None] % AROUND["vocab_size"], caches=caches)
    turns = [TOKENS[i % len(TOKENS) :] + TOKENS[: i % len(TOKENS)] for i in range(rounds + 1)]
    return [{n: timed(decoder, caches, n) for n in turn} for turn in turns][1:]


def row(attention: str, rounds: Sequence[dict[int, float]]) -> str:
    """A line of the table."""
    ms = (f"{1e3 * statistics.median(took[n] for took in rounds):.1f}" for n in TOKENS)
    ratios = [statistics.quantiles([took[n] / took[1] for took in rounds]) for n in TOKENS[1:]]
    return (
        f"| {attention} | {' | '.join(ms)} | {' | '.join(f'{q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})' for q in ratios)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}\n")
    print(f"| attention | {' | '.join(f'{n} tokens, ms' for n in TOKENS)} | 2 ÷ 1 (quartiles) | 3 ÷ 1 (quartiles) |")
    print(f"|---|{'---:|' * (2 * len(TOKENS) - 1)}")
    for attention in ATTENTIONS:
        print(row(attention, measured(attention, options.context, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
