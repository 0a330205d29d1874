"""The data module of a tokenised corpus; a resumed run gets the same batches.

The position in the data is read from Lightning's own counter at the start of each epoch's batches, and never counted
here; ``order.py`` then determines the batches. So the position is right for a checkpoint in the middle of an epoch, at
its end, or after an exception, with any number of workers or processes.

Not supported: mixtures of corpora, and streaming of text that does not fit on a disk.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy.typing as npt
from annotated_types import Ge
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, Seed, Whole
from blockwright.training.data import packing, ranks
from blockwright.training.data.corpus import Corpus, Split
from blockwright.training.data.modules.base import DataModule
from blockwright.training.data.order import EpochBatches, LineBatches, MixedOrder, Order
from blockwright.training.data.tokenizers.base import Tokenizer, vocabulary_of
from blockwright.training.data.windows import as_is
from blockwright.training.data.workers import forkserver, stay

Batches = DataLoader[dict[str, Tensor]]
Length = Annotated[int, Ge(2)]  # of a row: a token, and one to predict


@enforced("data")
@dataclass(frozen=True)
class Batching:
    """A corpus, and how it is made into batches.

    Args:
        corpus: the text and its division into train, val and test
        tokenizer: text to ids; fitted on the train split, once
        sequence_length: tokens of a row, at least 2
        batch_size: rows of a training batch over *all* processes, whose number divides it
        eval_batch_size: the same for validation and test; null for batch_size
        eval_windows: maximum number of rows evaluated per split, evenly spaced; null for all
        num_workers: loader processes per rank; 0 reads in the training process, which is fast enough for text
        seed: of the order of the batches
        cache_dir: folder for tokenised corpora, created if needed; any number of runs may share it
    """

    corpus: Corpus
    tokenizer: Tokenizer
    sequence_length: Length = 256
    batch_size: Count = 16
    eval_batch_size: Count | None = None
    eval_windows: Count | None = None
    num_workers: Whole = 0
    seed: Seed = 0
    cache_dir: str = "data/cache"


class CorpusDataModule(DataModule):
    """Batches of rows of a tokenised corpus. A subclass defines what a row is.

    Args:
        batching: the corpus, and how it is made into batches
    """

    tokenizer: Tokenizer

    def __init__(self, batching: Batching) -> None:
        super().__init__()
        self.corpus, self.tokenizer = batching.corpus, batching.tokenizer
        self.sequence_length, self.batch_size = batching.sequence_length, batching.batch_size
        self.eval_batch_size = batching.eval_batch_size or batching.batch_size
        self.eval_windows, self.num_workers, self.seed = batching.eval_windows, batching.num_workers, batching.seed
        self.cache_dir = Path(batching.cache_dir).expanduser()
        self._key: str | None = None
        self._read_fingerprint: str | None = None  # read by this process or another of the run
        self._failure: Exception | None = None  # of prepare_data, until sent to all processes
        self._streams: dict[Split, packing.Stream] = {}
        self._batches = 0

    # ---- defined by subclasses ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def order(self) -> Order | MixedOrder:
        """The order of the training rows; needs ``setup``."""

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
        if stage in (None, "fit"):
            self._check_batch_fits()
            self._check_sharing("batch_size", self.batch_size)
        self._check_sharing("eval_batch_size", self.eval_batch_size)
        # Two warnings that are wrong for these loaders: they do resume, and have little to do.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        warnings.filterwarnings("ignore", message=".*does not have many workers")

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
            self._key = packing.cache_key(self._corpus_fingerprint, self._encoder)
        return packing.pack(self.corpus, self._encoder, self.cache_dir, self._key)

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
        usual = {name: default for name, _, default in self._further()}
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
            **{name: value for name, value, usual in self._further() if value != usual},
        }

    def _further(self) -> list[tuple[str, Any, Any]]:
        """Name, value and default of settings that older checkpoints do not have."""
        return []

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
