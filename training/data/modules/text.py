"""Data modules of tokenised text: windows of next-token prediction (``data=text``), and the base of others.

A resumed run gets the same batches. Not supported: streaming of text that does not fit on a disk.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from blockwright.registry import register
from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.training.data import packing
from blockwright.training.data.corpus import SPLITS, Corpus, Split
from blockwright.training.data.modules.batches import Batches, Feeding, Length, RowDataModule
from blockwright.training.data.order import LineBatches, MixedOrder, Order, read_lengths
from blockwright.training.data.tokenizers.tokenizer import Tokenizer
from blockwright.training.data.windows import LongDocuments, Making, Transform, Windows


@enforced("data")
@dataclass(frozen=True)
class Batching(Feeding):
    """A corpus, and how it is made into batches.

    Args:
        corpus: the text and its division into train, val and test
    """

    corpus: Corpus = field(kw_only=True)


class CorpusDataModule(RowDataModule):
    """Batches of rows of a tokenised corpus. A subclass defines what a row is.

    Args:
        batching: the corpus, and how it is made into batches
    """

    def __init__(self, batching: Batching) -> None:
        super().__init__(batching)
        self.corpus = batching.corpus
        self._key: str | None = None
        self._streams: dict[Split, packing.Stream] = {}

    # ---- defined by subclasses ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _encoder(self) -> Tokenizer:
        """Encodes a document of the corpus."""

    @abstractmethod
    def _dataset(self, split: Split, length: int) -> Dataset[dict[str, Tensor]]:
        """The rows of a split, of so many tokens."""

    @abstractmethod
    def _line(self, split: Split, length: int, batch_size: int) -> LineBatches:
        """The order of a split's rows in an evaluation."""

    @abstractmethod
    def _check_lengths(self) -> None:
        """Refuse a corpus of which nothing fits into a row."""

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.corpus.check()
        self._pack()

    def setup(self, stage: str | None = None) -> None:
        """Map the cached tokens, on every process. Those that have not prepared them read no text.

        Args:
            stage: Lightning's stage; all splits are mapped in any stage, at no cost

        Raises:
            ConfigError: the error of ``prepare_data`` on any process; at ``data.sequence_length`` for a split shorter
                than a sequence; at ``data.batch_size`` or ``data.eval_batch_size`` for a batch that the processes
                cannot share, or with more windows than the train split
        """
        self._listen()
        packed = self._pack()
        if not self.tokenizer.fitted:
            self.tokenizer = type(self.tokenizer).from_json(packed.vocabulary)
        self._streams = packed.streams
        self._check_lengths()
        if stage in (None, "fit"):
            self._check_batch_fits()
        self._begin(stage)

    @property
    def _corpus_fingerprint(self) -> str:
        if self._read_fingerprint is None:
            self._read_fingerprint = self.corpus.fingerprint()  # reads all the text, so only once
        return self._read_fingerprint

    def _pack(self) -> packing.Packed:
        if self._key is None:  # before fitting the tokenizer, so that all processes and runs get the same name
            self._key = packing.cache_key(self._corpus_fingerprint, self._encoder)
        return packing.pack(self.corpus, self._encoder, self.cache_dir, self._key)

    def tokens(self, split: Split, places: slice = slice(None)) -> npt.NDArray[Any]:
        """The token ids of a split, or of some places in it; needs ``setup``. On disk there may be more of a token."""
        return self._streams[split].tokens[places]

    # ---- loaders ------------------------------------------------------------------------------------------------

    def _train_rows(self) -> Dataset[dict[str, Tensor]]:
        return self._dataset("train", self.sequence_length)

    def val_dataloader(self) -> Batches | list[Batches]:
        """The val split in order; an empty list for a corpus without one."""
        return self._evaluation("val")

    def val_windows(self, length: int) -> Batches | list[Batches]:
        """The val split in order, in windows of another length and batches of about as many tokens.

        Args:
            length: tokens of a window, at least 2
        """
        rows = max(1, self.eval_batch_size * self.sequence_length // length)
        _, ranks = self._share()
        return self._evaluation("val", length=length, batch_size=-(-rows // ranks) * ranks)

    def test_dataloader(self) -> Batches | list[Batches]:
        """The test split in order; an empty list for a corpus without one."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Batches | list[Batches]:
        """The windows of the test split."""
        # Lightning rebuilds batch samplers for prediction and warns about ours; a plain sampler it keeps.
        return self._evaluation("test", as_batch_sampler=False)

    # ---- before the run -------------------------------------------------------------------------------------------

    def overview(self, batches: int | None) -> list[dict[str, str]]:
        """A row for each split: tokens, documents, bytes a token, and how often training reads it."""
        rows = []
        for split, stream in self._streams.items():
            read = f"{batches / self.order.n_batches:.3g}" if split == "train" and batches is not None else ""
            n_bytes = self.tokenizer.token_bytes()[self.tokens(split, slice(100_000))]
            a_token = f"{n_bytes.mean():.2f}" if stream.n_tokens else ""
            sizes = {"tokens": f"{stream.n_tokens:,}", "documents": f"{len(stream.starts):,}"}
            rows.append({"split": split, **sizes, "bytes a token": a_token, "epochs": read})
        return rows

    def samples(self, n: int) -> list[tuple[str, str]]:
        """Split and text of n stretches of 64 tokens of each split, evenly spaced."""
        return [
            (split, self.tokenizer.decode(self.tokens(split, slice(at, at + 64)).tolist()))
            for split, stream in self._streams.items()
            for at in (i * stream.n_tokens // n for i in range(n if stream.n_tokens else 0))
        ]

    def _evaluation(
        self, split: Split, as_batch_sampler: bool = True, length: int | None = None, batch_size: int | None = None
    ) -> Batches | list[Batches]:
        n_tokens = self._streams[split].n_tokens
        if not n_tokens:
            return []
        length, batch_size = length or self.sequence_length, batch_size or self.eval_batch_size
        sampler = self._line(split, length, batch_size)
        if as_batch_sampler:
            return self._loader(self._dataset(split, length), batch_sampler=sampler)
        return self._loader(self._dataset(split, length), sampler=sampler, batch_size=None)

    def _check_batch_fits(self) -> None:
        if not self.order.n_batches:
            raise ConfigError(
                "data.batch_size",
                self.batch_size,
                f"the train split has only {self.order.n_windows} windows of {self.sequence_length} tokens",
                f"Set data.batch_size={self.order.n_windows} or less, or data.sequence_length lower",
            )

    def _identity(self) -> dict[str, Any]:
        """What determines the batches, except the tokenizer."""
        return {
            "corpus": self._corpus_fingerprint,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{name: value for name, value, usual in self._further() if value != usual},
        }


@register("data", "text")
class TextDataModule(CorpusDataModule):
    """Next-token batches from a corpus of text.

    A batch is a dictionary of int64 tensors: ``tokens``, ``targets`` (−100 where nothing is to be predicted) [B, T],
    ``n_bytes`` [B] (UTF-8 bytes of the predicted text), ``segments`` and ``positions`` [B, T] if a window contains more
    than one document or has other positions, and ``weights`` [B, T] (fp32) if a transform gives them. Rows may be all
    −100 in the last batch of an evaluation on several processes: sum the loss and divide by the count, since the mean
    over such a row is NaN.

    Args:
        batching: the corpus, and how it is made into batches; a row is a window
        documents: ``apart``: documents in one window do not see each other, and positions count from each one's start;
            ``joined``: a window is one document, in which the ids that end documents are tokens like others
        min_length: the training windows of ``sequence_length`` tokens are cut only from documents of at least so many
            tokens, and shorter ones (``lengths``) from all; null for all documents
        lengths: stages of training with windows of several lengths, see training/data/order.py; null for windows of
            ``sequence_length`` only. Every batch has as many tokens
        transforms: changes of training windows, by name (training/data/windows.py)
    """

    def __init__(
        self,
        batching: Batching,
        documents: Literal["apart", "joined"] = "apart",
        min_length: Length | None = None,
        lengths: Sequence[Mapping[str, Any]] | None = None,
        transforms: Mapping[str, Transform] | None = None,
    ) -> None:
        super().__init__(batching)
        self.documents, self.min_length = documents, min_length
        self.lengths = read_lengths(lengths, self.sequence_length, self.batch_size)
        self._stages = None if lengths is None else [dict(stage) for stage in lengths]
        self.transforms = {name: each for name, each in (transforms or {}).items() if each is not None}
        for each in self.transforms.values():
            for length in {self.sequence_length, *(self.lengths.all if self.lengths else ())}:
                each.check(length, self.tokenizer.vocab_size)

    def check(self) -> None:
        self.corpus.check()
        if self.corpus.is_small():
            documents = self.corpus.streams("train")
            self.tokenizer.check(part for document in documents for part in self.tokenizer.parts(document))
            _refuse_short(self.corpus, self.sequence_length)

    @property
    def positions(self) -> int:
        length = self.sequence_length
        return max([length, *(each.reach(length) for each in self.transforms.values())])

    def setup(self, stage: str | None = None) -> None:
        self.__dict__.pop("_long", None)  # of the streams before
        super().setup(stage)

    @property
    def order(self) -> Order | MixedOrder:
        n_tokens, long = self._streams["train"].n_tokens, self._long
        longest = Order(long.n_tokens if long else n_tokens, self.sequence_length, self.batch_size, self.seed)
        return longest if self.lengths is None else MixedOrder(longest, self.lengths, n_tokens)

    @cached_property
    def _long(self) -> LongDocuments | None:
        return None if self.min_length is None else LongDocuments(self._streams["train"], self.min_length)

    @property
    def _encoder(self) -> Tokenizer:
        return self.tokenizer

    def _dataset(self, split: Split, length: int) -> Dataset[dict[str, Tensor]]:
        joined = self.documents == "joined"
        if split == "train":
            places, making = packing.ring, Making(joined, self._long, self.transforms, self.seed)
        else:
            places, making = packing.line, Making(joined)
        return Windows(self._streams[split], length, self.tokenizer.token_bytes(), places, making)

    def _line(self, split: Split, length: int, batch_size: int) -> LineBatches:
        return LineBatches(self._streams[split].n_tokens, length, batch_size, self.eval_windows, *self._share())

    def _check_lengths(self) -> None:
        for split in SPLITS:
            n_tokens = self._streams[split].n_tokens
            if n_tokens <= self.sequence_length and (n_tokens or split == "train"):
                raise _too_short(split, n_tokens, self.sequence_length)

    def _further(self) -> list[tuple[str, Any, Any]]:
        transforms = {name: _settings(each) for name, each in self.transforms.items()}
        return [
            ("documents", self.documents, "apart"),
            ("min_length", self.min_length, None),
            ("lengths", None if self._stages is None else repr(self._stages), None),
            ("transforms", repr(transforms), "{}"),
        ]


def _settings(transform: Transform) -> dict[str, Any]:
    """The settings of a transform as plain types, to compare."""
    return {name: value for name, value in vars(transform).items() if isinstance(value, int | float | str | tuple)}


def _refuse_short(corpus: Corpus, sequence_length: int) -> None:
    """Refuse a split with fewer bytes than a sequence has tokens: a token is at least a byte, or ends a document."""
    for split in SPLITS:
        most = 0
        for document in corpus.streams(split):
            most += sum(len(text.encode()) for text in document) + 1
            if most > sequence_length:
                break
        if most <= sequence_length and (most or split == "train"):
            raise _too_short(split, most, sequence_length)


def _too_short(split: str, n_tokens: int, sequence_length: int) -> ConfigError:
    """The error for a split of so many tokens at most, shorter than one sequence."""
    fraction = "" if split == "train" else f", or hold out more of it, or none (data.corpus.{split}_fraction=0)"
    return ConfigError(
        "data.sequence_length",
        sequence_length,
        f"the {split} split has {n_tokens} tokens, one sequence and the token after it need {sequence_length + 1}",
        f"Set data.sequence_length={max(n_tokens - 1, 2)} or less, give the corpus more text{fraction}",
    )
