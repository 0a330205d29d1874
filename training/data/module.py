"""The data module: turns a corpus and a tokenizer into batches; a resumed run gets the same batches.

The position in the data is read from Lightning's own counter at the start of each epoch's batches, and never counted
here; ``order.py`` then determines the batches. So the position is right for a checkpoint in the middle of an epoch, at
its end, or after an exception, with any number of workers or processes.

Not supported: mixtures of corpora, and streaming of text that does not fit on a disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy.typing as npt
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, Seed, Whole
from blockwright.training.data import lengths as window_lengths
from blockwright.training.data import packing, ranks
from blockwright.training.data.corpus import SPLITS, Corpus, Split
from blockwright.training.data.long_documents import LongDocuments
from blockwright.training.data.order import EpochBatches, LineBatches, MixedOrder, Order
from blockwright.training.data.preflight import Length, check_transforms, too_short
from blockwright.training.data.tokenizers.base import Tokenizer, vocabulary_of
from blockwright.training.data.transform import Transform
from blockwright.training.data.windows import Making, Windows, as_is
from blockwright.training.data.workers import forkserver, stay

Batches = DataLoader[dict[str, Tensor]]


@enforced("data")
class TextDataModule(L.LightningDataModule):
    """Next-token batches from a corpus of text.

    A batch is a dictionary of int64 tensors: ``tokens``, ``targets`` (−100 where nothing is to be predicted) [B, T],
    ``n_bytes`` [B] (UTF-8 bytes of the predicted text), ``segments`` and ``positions`` [B, T] if a window contains more
    than one document or has other positions, and ``weights`` [B, T] (fp32) if a transform gives them. Rows may be all
    −100 in the last batch of an evaluation on several processes: sum the loss and divide by the count, since the mean
    over such a row is NaN.

    Args:
        corpus: the text and its division into train, val and test
        tokenizer: text to ids; fitted on the train split, once
        sequence_length: tokens of a window, at least 2
        batch_size: windows of a training batch over *all* processes, whose number divides it
        eval_batch_size: the same for validation and test; null for batch_size
        eval_windows: maximum number of windows evaluated per split, evenly spaced; null for all
        num_workers: loader processes per rank; 0 reads in the training process, which is fast enough for text
        seed: of the order of the batches
        cache_dir: folder for tokenised corpora, created if needed; any number of runs may share it
        documents: ``apart``: documents in one window do not see each other, and positions count from each one's start;
            ``joined``: a window is one document, in which the ids that end documents are tokens like others
        min_length: the training windows of ``sequence_length`` tokens are cut only from documents of at least so many
            tokens, and shorter ones (``lengths``) from all; null for all documents
        lengths: stages of training with windows of several lengths, see training/data/lengths.py; null for windows of
            ``sequence_length`` only. Every batch has as many tokens
        transforms: changes of training windows, by name (training/data/transform.py)
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        sequence_length: Length = 256,
        batch_size: Count = 16,
        eval_batch_size: Count | None = None,
        eval_windows: Count | None = None,
        num_workers: Whole = 0,
        seed: Seed = 0,
        cache_dir: str = "data/cache",
        documents: Literal["apart", "joined"] = "apart",
        min_length: Length | None = None,
        lengths: Sequence[Mapping[str, Any]] | None = None,
        transforms: Mapping[str, Transform] | None = None,
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer = corpus, tokenizer
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.eval_windows, self.num_workers, self.seed = eval_windows, num_workers, seed
        self.cache_dir = Path(cache_dir).expanduser()
        self.documents, self.min_length = documents, min_length
        self.lengths = window_lengths.read(lengths, sequence_length, batch_size)
        self._stages = None if lengths is None else [dict(stage) for stage in lengths]
        self.transforms = {name: each for name, each in (transforms or {}).items() if each is not None}
        check_transforms(self.transforms, sequence_length, tokenizer.vocab_size, self.lengths)
        self._key: str | None = None
        self._read_fingerprint: str | None = None  # read by this process or another of the run
        self._failure: Exception | None = None  # of prepare_data, until sent to all processes
        self._streams: dict[Split, packing.Stream] = {}
        self._batches = 0

    # ---- tokens -------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise the corpus into the cache, if needed. Lightning calls this on one process per node.

        Raises:
            ConfigError: from the corpus, the tokenizer, or at ``data.cache_dir``. With several processes ``setup``
                raises it instead, on all of them, so that none waits for one that has ended
        """
        try:
            self.corpus.check()
            self._pack()
        except Exception as error:
            if not ranks.are_several():
                raise
            self._failure = error

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
        self.__dict__.pop("_long", None)  # of the streams before
        if stage in (None, "fit"):
            self._check_batch_fits()
            self._check_sharing("batch_size", self.batch_size)
        self._check_sharing("eval_batch_size", self.eval_batch_size)
        # Two warnings that are wrong for these loaders: they do resume, and have little to do.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        warnings.filterwarnings("ignore", message=".*does not have many workers")

    @property
    def order(self) -> Order | MixedOrder:
        """The order of the training windows; needs ``setup``."""
        n_tokens, long = self._streams["train"].n_tokens, self._long
        longest = Order(long.n_tokens if long else n_tokens, self.sequence_length, self.batch_size, self.seed)
        return longest if self.lengths is None else MixedOrder(longest, self.lengths, n_tokens)

    @cached_property
    def _long(self) -> LongDocuments | None:
        return None if self.min_length is None else LongDocuments(self._streams["train"], self.min_length)

    def _listen(self) -> None:
        """Receive the fingerprint of the text from this node's process that has read it, or its error."""
        if self.trainer is None or not ranks.are_several():
            return
        error, self._failure = self._failure, None
        failure = None if error is None else ranks.as_refusal(error)
        try:
            fingerprint = ranks.exchange(ranks.Word(self.trainer.node_rank, self._read_fingerprint, failure))
        except ConfigError as refusal:
            raise refusal from error
        self._read_fingerprint = fingerprint

    @property
    def _corpus_fingerprint(self) -> str:
        if self._read_fingerprint is None:
            self._read_fingerprint = self.corpus.fingerprint()  # reads all the text, so only once
        return self._read_fingerprint

    def _pack(self) -> packing.Packed:
        if self._key is None:  # before fitting the tokenizer, so that all processes and runs get the same name
            self._key = packing.cache_key(self._corpus_fingerprint, self.tokenizer)
        return packing.pack(self.corpus, self.tokenizer, self.cache_dir, self._key)

    def tokens(self, split: Split) -> npt.NDArray[Any]:
        """The token ids of a split, mapped from disk; needs ``setup``."""
        return self._streams[split].tokens

    # ---- loaders ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        """The rest of the current epoch, then whole epochs, without end."""
        sampler = EpochBatches(
            self.order,
            *self._share(),
            epoch_length=self._epoch_length(),
            consumed=self._consumed_in_order if self.trainer else None,
            start=self._batches,
        )
        return self._loader("train", self.sequence_length, batch_sampler=sampler)

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

    def _evaluation(
        self, split: Split, as_batch_sampler: bool = True, length: int | None = None, batch_size: int | None = None
    ) -> Batches | list[Batches]:
        n_tokens = self._streams[split].n_tokens
        if not n_tokens:
            return []
        length, batch_size = length or self.sequence_length, batch_size or self.eval_batch_size
        sampler = self._line(split, length, batch_size)
        if as_batch_sampler:
            return self._loader(split, length, batch_sampler=sampler)
        return self._loader(split, length, sampler=sampler, batch_size=None)

    def _line(self, split: Split, length: int, batch_size: int) -> LineBatches:
        return LineBatches(self._streams[split].n_tokens, length, batch_size, self.eval_windows, *self._share())

    def _dataset(self, split: Split, length: int) -> Dataset[dict[str, Tensor]]:
        joined = self.documents == "joined"
        if split == "train":
            places, making = packing.ring, Making(joined, self._long, self.transforms, self.seed)
        else:
            places, making = packing.line, Making(joined)
        return Windows(self._streams[split], length, self.tokenizer.token_bytes(), places, making)

    def _loader(self, split: Split, length: int, **sampling: Any) -> Batches:
        return DataLoader(
            self._dataset(split, length),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=forkserver() if self.num_workers else None,
            worker_init_fn=stay,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            collate_fn=as_is,  # type: ignore[arg-type]
            **sampling,
        )

    def _share(self) -> tuple[int, int]:
        """(rank, number) of this process among those that read different data.

        This is not the trainer's world size: processes that split one model by tensors read the same batch.
        """
        sharing = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (sharing["rank"], sharing["num_replicas"]) if sharing else (0, 1)

    def _check_lengths(self) -> None:
        for split in SPLITS:
            n_tokens = self._streams[split].n_tokens
            if n_tokens <= self.sequence_length and (n_tokens or split == "train"):
                raise too_short(split, n_tokens, self.sequence_length)

    def _check_batch_fits(self) -> None:
        if not self.order.n_batches:
            raise ConfigError(
                "data.batch_size",
                self.batch_size,
                f"the train split has only {self.order.n_windows} windows of {self.sequence_length} tokens",
                f"Set data.batch_size={self.order.n_windows} or less, or data.sequence_length lower",
            )

    def _check_sharing(self, key: str, n_windows: int) -> None:
        _, world_size = self._share()
        if n_windows % world_size:
            raise ConfigError(
                f"data.{key}",
                n_windows,
                f"it counts windows over all processes, and {world_size} of them share the data evenly",
                f"Set data.{key}={-(-n_windows // world_size) * world_size}",
            )
        if world_size > 1 and self.trainer and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "trainer.use_distributed_sampler",
                True,
                "this data module divides its batches itself; Lightning's sampler would replace that",
                "Set trainer.use_distributed_sampler=false",
            )

    # ---- resuming -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, and the tokenizer, in plain types."""
        return {"batches": self._consumed(), "tokenizer": self.tokenizer.to_json(), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with this; the position follows from Lightning's counter.

        Another corpus, seed or size causes a warning: it may be intended, for example to continue with longer
        sequences, but the batches differ from those of the uninterrupted run.

        Args:
            state_dict: from ``state_dict``

        Raises:
            ConfigError: at ``data.tokenizer``, if the checkpoint's ids mean other text than the ids here
        """
        theirs = {"kind": None, "vocab_size": None, **state_dict["tokenizer"]}
        if vocabulary_of(theirs) != vocabulary_of(self.tokenizer.to_json()):
            raise ConfigError(
                "data.tokenizer",
                f"{self.tokenizer.kind}, vocab_size {self.tokenizer.vocab_size}",
                f"the checkpoint was trained with another vocabulary ({theirs['kind']}, {theirs['vocab_size']} ids, "
                "perhaps fitted on another corpus), so its embeddings mean other tokens",
                "Use the checkpoint's tokenizer and corpus, or start a new run without ckpt_path",
            )
        self._batches = state_dict["batches"]
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._warn_of_other_batches(state_dict)

    def _warn_of_other_batches(self, state_dict: Mapping[str, Any]) -> None:
        usual = {name: default for name, _, default in self._further}
        theirs = {**usual, **state_dict}
        changed = [
            f"{name} was {theirs[name]}, is {value}"
            for name, value in {**usual, **self._identity()}.items()
            if theirs[name] != value
        ]
        if changed:
            rank_zero_warn(
                f"Resuming on other data than the checkpoint's ({'; '.join(changed)}): training continues from batch "
                f"{state_dict['batches']}, but with other batches than the uninterrupted run.",
            )

    def _identity(self) -> dict[str, Any]:
        """What determines the batches, except the tokenizer."""
        return {
            "corpus": self._corpus_fingerprint,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{name: value for name, value, usual in self._further if value != usual},
        }

    @property
    def _further(self) -> list[tuple[str, Any, Any]]:
        """Name, value and default of settings that older checkpoints do not have."""
        transforms = {name: _settings(each) for name, each in self.transforms.items()}
        return [
            ("documents", self.documents, "apart"),
            ("min_length", self.min_length, None),
            ("lengths", None if self._stages is None else repr(self._stages), None),
            ("transforms", repr(transforms), "{}"),
        ]

    def _consumed(self) -> int:
        """Global batches that training has consumed, over all epochs."""
        if self.trainer is None:
            return self._batches
        # "processed" is the only count that is always right: "ready" is ahead when a step raises, "completed" is
        # behind when a checkpoint is written in on_train_batch_end, after the optimizer's step.
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def _consumed_in_order(self) -> int:
        """``_consumed`` in the order of the batches: overfitting repeats the first batches."""
        is_overfitting = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return self._consumed() % self._epoch_length() if is_overfitting else self._consumed()

    def _epoch_length(self) -> int:
        """Batches per epoch of the trainer, respecting ``limit_train_batches``."""
        n_batches = self.order.n_batches
        limit = self.trainer.limit_train_batches if self.trainer else None
        if limit is None:
            return n_batches
        return max(1, min(n_batches, limit if isinstance(limit, int) else int(n_batches * limit)))


def _settings(transform: Transform) -> dict[str, Any]:
    """The settings of a transform as plain types, to compare."""
    return {name: value for name, value in vars(transform).items() if isinstance(value, int | float | str | tuple)}
