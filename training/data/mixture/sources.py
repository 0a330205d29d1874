"""The sources of a mixture: shards of tokens, or a corpus of text that is tokenised into the cache.

A package adds its own, on an object store for instance: it subclasses ``Source`` and names the class as ``_target_``.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.training.data import packing
from blockwright.training.data.corpus import Corpus, Split, expand
from blockwright.training.data.mixture.order import MixtureOrder
from blockwright.training.data.mixture.shards import DTYPES, After, Documents, Reading, Shard, open_shard
from blockwright.training.data.mixture.tokens import Shards, Stretch, Tokens, agreement, ids_digest, samples
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

SEARCHED = 2**16  # tokens read at a time to find the start of a document


@dataclass(frozen=True)
class Place:
    """Where a source is configured, and what it shares with the others.

    Args:
        path: of its node: ``data.sources.NAME``
        tokenizer: that made the ids, or makes them
        cache_dir: folder for tokenised corpora
    """

    path: str
    tokenizer: Tokenizer
    cache_dir: Path


@dataclass(frozen=True)
class Opened:
    """The tokens of a source.

    Args:
        train: to train on
        val: to validate on; None for none
        files: key of the setting → files that it names
        made_by_ours: whether fingerprints show that the tokenizer made them
    """

    train: Tokens
    val: Tokens | None = None
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    made_by_ours: bool = False


class Source(ABC):
    """Where tokens of one kind come from. Its constructor is its schema, and reads nothing."""

    @classmethod
    def target(cls, node: Mapping[str, Any]) -> str:
        """The class of a node that names none."""
        chosen = CorpusSource if "corpus" in node else ShardFiles
        return f"{chosen.__module__}.{chosen.__qualname__}"

    @abstractmethod
    def check(self, place: Place) -> Opened | None:
        """Refuse, before a run, what cannot work, in well under a second.

        Returns:
            the tokens; None if they are not tokenised yet

        Raises:
            ConfigError: below ``place.path``
        """

    def prepare(self, place: Place) -> str:  # by default nothing is to be done
        """Tokenise, if needed. One process per node does it.

        Returns:
            what other processes need to open the same tokens
        """
        return ""

    @abstractmethod
    def open(self, place: Place, prepared: str) -> Opened:
        """The tokens.

        Args:
            place: where it is configured
            prepared: by ``prepare``, of this process or another of the node

        Raises:
            ConfigError: below ``place.path``
        """


class ShardFiles(Source):
    """Files of token ids, read where they are; the formats are those of ``shards.py``.

    Args:
        files: a path or glob (``web/*.bin``), or a list of them, read in sorted order
        val: the same of files to validate on; null for none
        val_tokens: validate on the last documents of ``files``, about so many tokens; null for none
        dtype: of the ids in files that do not say it: uint16, uint32, int32 or int64
        documents: ``eos``: the tokenizer's id that ends a document ends each; ``bos``: the one that begins a document
            begins each; ``index``: the format's index lists them; ``joined``: a file is one document; null to find out
    """

    def __init__(
        self,
        files: str | Sequence[str],
        val: str | Sequence[str] | None = None,
        val_tokens: int | None = None,
        dtype: str | None = None,
        documents: str | None = None,
    ) -> None:
        self.files, self.val, self.val_tokens, self.dtype, self.documents = files, val, val_tokens, dtype, documents

    def check(self, place: Place) -> Opened:
        for key, value, known in (("dtype", self.dtype, DTYPES), ("documents", self.documents, get_args(Documents))):
            if value not in (None, *known):
                raise ConfigError(f"{place.path}.{key}", value, "there is no such choice", did_you_mean(value, known))
        if self.val is not None and self.val_tokens is not None:
            rule = "validation has files of its own (val), or the last tokens of files, and not both"
            raise ConfigError(f"{place.path}.val_tokens", self.val_tokens, rule, "Leave one of them out")
        return self.open(place, "")

    def open(self, place: Place, prepared: str) -> Opened:
        train, named = self._named(self.files, "files", place), {}
        named["files"] = [shard.path for shard in train]
        if self.val is not None:
            val = self._named(self.val, "val", place)
            named["val"] = [shard.path for shard in val]
            return Opened(Shards(train), Shards(val), named, all(shard.tokenizer for shard in (*train, *val)))
        whole, known = Shards(train), all(shard.tokenizer for shard in train)
        if self.val_tokens is None:
            return Opened(whole, None, named, known)
        n: Any = self.val_tokens
        if isinstance(n, bool) or not isinstance(n, int) or not 0 < n < whole.n_tokens:
            rule = f"must be a number of tokens above 0 and below those of the files ({whole.n_tokens:,})"
            raise ConfigError(f"{place.path}.val_tokens", n, rule, "Write for example 1_000_000, or name files as val")
        cut = _cut_before(whole, n)
        return Opened(Stretch(whole, 0, cut), Stretch(whole, cut, whole.n_tokens), named, known)

    def _named(self, files: str | Sequence[str], key: str, place: Place) -> list[Shard]:
        path, tokenizer = f"{place.path}.{key}", place.tokenizer
        patterns = [files] if isinstance(files, str) else list(files)
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise ConfigError(path, files, "must be a path or glob, or a list of them", f"Write {path}='web/*.bin'")
        found = sorted({file for pattern in patterns for file in expand(pattern, path)})
        _warn_of_gaps(path, found)
        documents: Any = self.documents
        reading = Reading(path, tokenizer.eos, tokenizer.bos, self.dtype, documents)
        shards, ours = [open_shard(file, reading) for file in found], ids_digest(tokenizer)
        for shard in shards:
            if shard.tokenizer not in (None, ours):
                rule = f"was made by another tokenizer than this one ({tokenizer.kind}, {tokenizer.vocab_size:,} ids)"
                raise ConfigError(path, str(shard.path), rule, "Use that one, or tokenise the text again")
        return shards


class CorpusSource(Source):
    """A corpus of text, tokenised into the cache, with its own validation split.

    Args:
        corpus: the text and its division; its test split is not read
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def check(self, place: Place) -> None:
        if not isinstance(self.corpus, Corpus):
            rule = f"the class is not a {Corpus.__name__}"
            remedy = f"Write {place.path}.corpus._target_=blockwright.training.data.corpus.TextFiles, or another corpus"
            raise ConfigError(f"{place.path}.corpus", type(self.corpus).__name__, rule, remedy)
        with _named_as(place):
            self.corpus.check()

    def prepare(self, place: Place) -> str:
        with _named_as(place):
            key = packing.cache_key(self.corpus.fingerprint(), place.tokenizer)
            packing.pack(self.corpus, place.tokenizer, place.cache_dir, key)
        return key

    def open(self, place: Place, prepared: str) -> Opened:
        with _named_as(place):
            packed = packing.pack(self.corpus, place.tokenizer, place.cache_dir, prepared)

        def tokens(split: Split) -> Shards | None:
            stream = packed.streams[split]
            shard = Shard(stream.path, stream.dtype, 0, stream.n_tokens, After(stream.eos), digest=prepared)
            return Shards([shard]) if stream.n_tokens else None

        train = tokens("train")
        if train is None:
            raise ConfigError(f"{place.path}.corpus", type(self.corpus).__name__, "has no text to train on", "Add some")
        return Opened(train, tokens("val"), made_by_ours=True)


@contextmanager
def _named_as(place: Place) -> Iterator[None]:
    """Name the corpus of a source in errors, which are those of ``data.corpus``."""
    try:
        yield
    except ConfigError as error:
        path = re.sub(r"^data\.corpus\b", f"{place.path}.corpus", error.path)
        remedy = error.remedy.replace("data.corpus", f"{place.path}.corpus")
        raise ConfigError(path, error.value, error.rule, remedy) from None


def _cut_before(whole: Tokens, n: int) -> int:
    """The first start of a document among the last n tokens; the first of these if they are of one document."""
    first = whole.n_tokens - n
    for at in range(first, whole.n_tokens, SEARCHED):
        _, begins = whole.read(at - 1, min(at + SEARCHED, whole.n_tokens))  # with the token before, which may end one
        if begins[1:].any():
            return at + int(begins[1:].argmax())
    return first


def _warn_of_gaps(path: str, files: Sequence[Path]) -> None:
    """Warn of files that numbered names suggest and that are missing: a copy may not have ended."""
    by_name: dict[tuple[str, str], list[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", str(file)):
            by_name.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (before, after), numbers in by_name.items():
        missing = sorted(set(range(min(numbers), max(numbers))) - set(numbers)) if len(numbers) > 2 else []
        if 0 < len(missing) < len(numbers):
            warnings.warn(f"{path}: of {before}…{after} the number {missing[0]} is missing", stacklevel=2)


# --- what a mixture is made of, as a table: to look at before a run ---


def overview(
    opened: Mapping[str, Opened], order: MixtureOrder, batches: int | None, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """A row for each source: tokens, shares by stage, epochs, and what stretches of it show.

    Args:
        opened: the sources
        order: of the run's windows
        batches: of the run; None if it has no end: then there are no epochs
        tokenizer: of the run
    """
    epochs = {} if batches is None else order.epochs(batches)
    stages = {f"stage {i}": stage.weights for i, stage in enumerate(order.schedule.stages, start=1)}
    rows = []
    for name, source in opened.items():
        shares = {stage: _percent(weights.get(name, 0), sum(weights.values())) for stage, weights in stages.items()}
        read = {"epochs": f"{epochs[name]:.3g}" if name in epochs else ""}
        held_out = 0 if source.val is None else source.val.n_tokens
        sizes = {"tokens": f"{source.train.n_tokens:,}", "held out": f"{held_out:,}" if held_out else ""}
        rows.append({"source": name, **sizes, **shares, **read, **_shown(source, tokenizer)})
    return rows


def texts(opened: Mapping[str, Opened], tokenizer: Tokenizer, n: int) -> list[tuple[str, str]]:
    """Name and text of n stretches of each source."""
    return [
        (name, tokenizer.decode(sample)) for name, source in opened.items() for sample in samples(source.train, n, 64)
    ]


def _shown(source: Opened, tokenizer: Tokenizer) -> dict[str, str]:
    """Figures of stretches: mean length of documents and bytes of tokens, the highest id, and the tokenizer."""
    stretches = samples(source.train)
    ids = np.array([i for stretch in stretches for i in stretch])
    made = "same fingerprint" if source.made_by_ours else f"{agreement(source.train, tokenizer):.1%} encodes back"
    return {
        "bytes a token": f"{tokenizer.token_bytes()[ids].mean():.2f}",
        "highest id": f"{ids.max():,} of {tokenizer.vocab_size:,}",
        "tokenizer": made,
    }


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if part else ""
