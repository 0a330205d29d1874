"""Preparing text takes little memory, whatever the size of the file."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from blockwright.training.data.packing import cache_key, pack
from blockwright.training.data.text import TextFiles
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.data.tokenizers.chars import Chars

ROOT = Path(__file__).parents[3]
MIB = 2**20
# The peak of a process of its own; tokens are mapped, and not touched.
PROGRAM = """
import sys
from pathlib import Path
from blockwright.training.data.packing import cache_key, pack
from blockwright.training.data.text import TextFiles
from blockwright.training.data.tokenizers.rebuild import rebuild

file, kind, vocab_size, separator, cache = sys.argv[1:]
corpus, tokenizer = TextFiles(file, separator or None), rebuild({"kind": kind, "vocab_size": int(vocab_size)})
corpus.check()
pack(corpus, tokenizer, Path(cache), cache_key(corpus.fingerprint(), tokenizer))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def write(file: Path, n_bytes: int) -> Path:
    """Lines of 20,000 different words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=draw.randint(2, 9))) for _ in range(20_000)]
    ends = ["\n", "\r\n", ".\n", "\n\n"]
    lines = (" ".join(draw.choices(words, k=12)) + draw.choice(ends) for _ in range(10_000))
    block = "".join(lines).encode()
    with file.open("wb") as out:
        while out.tell() < n_bytes:
            out.write(block)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [Bytes(), Chars(64)], ids=lambda t: t.kind)
def test_a_file_is_prepared_in_less_memory_than_it_has_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = TextFiles(str(write(tmp_path / "a.txt", 12 * MIB)))
    tracemalloc.start()
    try:
        pack(corpus, tokenizer, tmp_path, cache_key(corpus.fingerprint(), tokenizer))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("kind", "vocab_size", "separator", "megabytes"), [("bytes", 257, "", 200), ("bpe", 1000, "\n", 80)]
)
def test_a_large_file_is_prepared_in_64_mib_more_than_a_small_one(
    tmp_path: Path, environment: dict[str, str], kind: str, vocab_size: int, separator: str, megabytes: int
) -> None:
    def peak(n_bytes: int) -> int:
        file = write(tmp_path / "a.txt", n_bytes)
        command = [sys.executable, "-c", PROGRAM, str(file), kind, str(vocab_size), separator, str(tmp_path / "cache")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    small, large = peak(10**6), peak(megabytes * 10**6)
    print(f"{kind} {separator!r} {megabytes} MB: {(large - small) / MIB:.1f} MiB over {small / MIB:.0f} MiB")
    assert large - small < 64 * MIB
