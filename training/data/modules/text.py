"""The data module of text: windows of next-token prediction, ``data=text``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.training.data import packing
from blockwright.training.data.corpus import SPLITS, Corpus, Split
from blockwright.training.data.modules.batches import Length
from blockwright.training.data.modules.corpus import Batching, CorpusDataModule
from blockwright.training.data.order import LineBatches, MixedOrder, Order, read_lengths
from blockwright.training.data.tokenizers.tokenizer import Tokenizer
from blockwright.training.data.windows import LongDocuments, Making, Transform, Windows


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
