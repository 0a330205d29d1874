"""A corpus in memory, and a data module on it, for the tests of this folder."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockwright.training.data.corpus import Corpus, Split
from tests import built


class Memory(Corpus):
    """Documents as given: also the shortest example of your own corpus."""

    def __init__(self, train: list[str], val: list[str] | None = None, test: list[str] | None = None) -> None:
        self.texts: dict[Split, list[str]] = {"train": train, "val": val or [], "test": test or []}

    def documents(self, split: Split) -> Iterator[str]:
        return iter(self.texts[split])

    def check(self) -> None:
        pass

    def is_small(self) -> bool:
        return True

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()


def some_text(n: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ,.\n", k=n))


@pytest.fixture
def memory() -> type[Memory]:
    return Memory


@pytest.fixture
def small_corpus() -> Memory:
    """Train: 7 documents, 1,057 byte tokens with their ends; val: 2 documents, 162; test: 1, 81."""
    return Memory([some_text(150, i) for i in range(7)], [some_text(80, 10), some_text(80, 11)], [some_text(80, 12)])


@pytest.fixture
def make_module(tmp_path: Path, small_corpus: Memory) -> Callable:
    """Builds a data module: byte tokens, windows of 16, batches of 4 (16 batches an epoch), cache in tmp_path."""
    from blockwright.training.data.modules.text import TextDataModule
    from blockwright.training.data.tokenizers.tokenizer import Bytes

    def make(**changes) -> TextDataModule:
        defaults = {
            "corpus": small_corpus,
            "tokenizer": Bytes(),
            "sequence_length": 16,
            "batch_size": 4,
            "cache_dir": str(tmp_path / "cache"),
        }
        return built.data("text", **{**defaults, **changes})

    return make
