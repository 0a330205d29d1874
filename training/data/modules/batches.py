"""The contract of ``data``, and what every data module of rows does: batches in an order that a resumed run continues.

Batches are dealt to the processes.

The position in the data is read from Lightning's own counter at the start of each epoch's batches, and never counted
here; ``order.py`` then determines the batches. So the position is right for a checkpoint in the middle of an epoch, at
its end, or after an exception, with any number of workers or processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning as L
import torch.distributed as dist
from annotated_types import Ge
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockwright.registry import Composable, family
from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Count, Seed, Whole
from blockwright.registry.schema import Place
from blockwright.training.data.order import EpochBatches, MixedOrder, Order
from blockwright.training.data.tokenizers.tokenizer import Tokenizer, vocabulary_of
from blockwright.training.data.windows import as_is
from blockwright.training.figure import Figure


@family("data", root="", context=("model",))
class DataModule(Composable, L.LightningDataModule):
    """A Lightning data module whose training batches are a function of the step, so that a run resumes in the middle.

    Registered as ``@register("data", NAME)`` it is the option ``data=NAME``; its constructor is its schema, as a
    block's is. A constructor may also take ``model``, the composition of the run's model. It reads no large file.

    Attributes:
        tokenizer: of its texts; None for data without text
        eval_windows: at most so many rows are evaluated during training; None for all, as in the final figures
        figures: what ``figures_at`` gives, and what is measured of each of several validation loaders, with units
    """

    figures: ClassVar[tuple[Figure, ...]] = ()
    tokenizer: Tokenizer | None = None
    eval_windows: int | None = None

    def check(self) -> None:
        """Refuse, before a run, what cannot work; nothing is written, and no large text is read.

        Raises:
            ConfigError: at ``data.<key>``
        """

    def check_run(self, batches: int | None) -> None:  # by default a run of any length is possible
        """Refuse, before a run and after ``check``, a training of another length than the data allows.

        Args:
            batches: micro-batches of the run; None if it has no number of steps

        Raises:
            ConfigError: at ``data.<key>`` or ``trainer.<key>``
        """

    @property
    def val_weights(self) -> Mapping[str, float]:
        """Name of each validation loader, if there are several, in order → its weight in ``val/loss``.

        ``val/<name>/loss`` and ``val/<name>/bits_per_byte`` are logged too. Empty for one loader, which needs no name.
        """
        return {}

    def figures_at(self, batch: int) -> Mapping[str, float]:
        """Figures of the data itself after so many batches of training, by logged name.

        They are logged with the loss of training and at each validation.

        Args:
            batch: global batches that training has begun
        """
        return {}

    def overview(self, batches: int | None) -> Sequence[Mapping[str, str]]:
        """Rows of a table of what the data is made of, by column; needs ``setup``. Override it where there is one.

        Args:
            batches: micro-batches of the run; None if it has no number of steps
        """
        return ()

    def samples(self, n: int) -> Sequence[tuple[str, str]]:
        """The part of the data and the text of n samples of each part; needs ``setup``."""
        return ()

    @property
    def positions(self) -> int:
        """The number of positions that a model needs for the training batches; 0 if that does not depend on them."""
        return 0


# --- exchange between the rank that prepares the data and the others: the corpus's fingerprint, or an error ---


@dataclass(frozen=True)
class Word:
    """One rank's message.

    Args:
        node: index of its machine
        fingerprint: of the corpus; None if this rank has not read it
        failure: why it could not prepare the data; None if it did not fail
    """

    node: int
    fingerprint: str | None = None
    failure: ConfigError | None = None


def are_several() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def as_refusal(error: Exception) -> ConfigError:
    """An error that can be sent to other ranks."""
    if isinstance(error, ConfigError):
        return ConfigError(error.path, str(error.value), error.rule, error.remedy)
    rule = f"could not be prepared by rank {dist.get_rank()} ({type(error).__name__}: {error})"
    return ConfigError("data", "corpus", rule, "See the first error printed by this rank")


def exchange(own: Word) -> str | None:
    """Exchange all ranks' messages; must be called by all ranks.

    Returns:
        the fingerprint used on this rank's node; None if no rank has read the corpus

    Raises:
        ConfigError: on every rank, if one has failed or nodes have read different text
    """
    words: list[Word] = [own] * dist.get_world_size()
    dist.all_gather_object(words, own)
    for word in words:
        if word.failure is not None:
            raise word.failure
    found = {word.fingerprint: word.node for word in reversed(words) if word.fingerprint is not None}
    if len(found) > 1:
        raise ConfigError(
            "data.corpus",
            f"nodes {', '.join(map(str, sorted(found.values())))}",
            "their copies of the text differ, so their ranks would train on different data",
            "Copy the same files to every node",
        )
    return next(iter(found), None)


# --- loader processes: how they are started, and how they react to the signals that stop a run ---


GRACE_S = 5  # at exit the interpreter sends its children SIGTERM and waits for them


def forkserver() -> BaseContext | None:
    """The start method of loader processes; None on systems without a fork server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "blockwright.training.data.loader_server"])
    return context


def stay(worker: int) -> None:
    """In a new loader process: ignore SIGINT; on SIGTERM exit after ``GRACE_S``; exit when the trainer dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """torch watches the worker's parent, which is the server, not the training process; so watch that too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


Batches = DataLoader[dict[str, Tensor]]
Length = Annotated[int, Ge(2)]  # of a row: a token, and one to predict


@enforced("data")
@dataclass(frozen=True)
class Feeding:
    """How rows of tokens are made into batches.

    Args:
        tokenizer: text to ids; fitted on the train split, once
        sequence_length: tokens of a row, at least 2
        batch_size: rows of a training batch over *all* processes, whose number divides it
        eval_batch_size: the same for validation and test; null for batch_size
        eval_windows: maximum number of rows evaluated per split, evenly spaced; null for all
        num_workers: loader processes per rank; 0 reads in the training process, which is fast enough for text
        seed: of the order of the batches
        cache_dir: folder for tokenised corpora, created if needed; any number of runs may share it
    """

    tokenizer: Tokenizer
    sequence_length: Length = 256
    batch_size: Count = 16
    eval_batch_size: Count | None = None
    eval_windows: Count | None = None
    num_workers: Whole = 0
    seed: Seed = 0
    cache_dir: Place = "data/cache"


class RowDataModule(DataModule):
    """Batches of rows of tokens. A subclass has the rows, their order and what determines them.

    Args:
        feeding: how rows are made into batches
    """

    tokenizer: Tokenizer

    def __init__(self, feeding: Feeding) -> None:
        super().__init__()
        self.tokenizer = feeding.tokenizer
        self.sequence_length, self.batch_size = feeding.sequence_length, feeding.batch_size
        self.eval_batch_size = feeding.eval_batch_size or feeding.batch_size
        self.eval_windows, self.num_workers, self.seed = feeding.eval_windows, feeding.num_workers, feeding.seed
        self.cache_dir = Path(feeding.cache_dir).expanduser()
        self._batches = 0
        self._read_fingerprint: str | None = None  # of the tokens, read by this process or another of the run
        self._failure: Exception | None = None  # of prepare_data, until sent to all processes

    # ---- defined by subclasses ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def order(self) -> Order | MixedOrder:
        """The order of the training rows; needs ``setup``."""

    @abstractmethod
    def _prepare(self) -> None:
        """Check what the tokens are made of, and write them to the cache, if needed; set ``_read_fingerprint``."""

    @abstractmethod
    def _train_rows(self) -> Dataset[dict[str, Tensor]]:
        """The rows of training."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What determines the batches, except the tokenizer."""

    def _further(self) -> list[tuple[str, Any, Any]]:
        """Name, value and default of settings that older checkpoints do not have."""
        return []

    # ---- tokens -------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the tokens. Lightning calls this on one process per node.

        Raises:
            ConfigError: from what the tokens are made of, or at ``data.cache_dir``. With several processes ``setup``
                raises it instead, on all of them, so that none waits for one that has ended
        """
        try:
            self._prepare()
        except Exception as error:
            if not are_several():
                raise
            self._failure = error

    def _listen(self) -> None:
        """Receive the fingerprint of the tokens from this node's process that has prepared them, or its error."""
        if self.trainer is None or not are_several():
            return
        error, self._failure = self._failure, None
        failure = None if error is None else as_refusal(error)
        try:
            fingerprint = exchange(Word(self.trainer.node_rank, self._read_fingerprint, failure))
        except ConfigError as refusal:
            raise refusal from error
        self._read_fingerprint = fingerprint

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
        return self._loader(self._train_rows(), batch_sampler=sampler)

    def _loader(self, rows: Dataset[dict[str, Tensor]], **sampling: Any) -> Batches:
        return DataLoader(
            rows,
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

    def _begin(self, stage: str | None) -> None:
        """Check that the processes can share the batches of a stage, None for all, and leave out wrong warnings."""
        if stage in (None, "fit"):
            self._check_sharing("batch_size", self.batch_size)
        self._check_sharing("eval_batch_size", self.eval_batch_size)
        # Two warnings that are wrong for these loaders: they do resume, and have little to do.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        warnings.filterwarnings("ignore", message=".*does not have many workers")

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
        if changed := self.changes(state_dict):
            rank_zero_warn(
                f"Resuming on other data than the checkpoint's ({'; '.join(changed)}): training continues from batch "
                f"{state_dict['batches']}, but with other batches than the uninterrupted run.",
            )

    def changes(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What determines the batches and was different in a checkpoint."""
        usual = {name: default for name, _, default in self._further()}
        theirs = {**usual, **state_dict}
        return [
            f"{name} was {theirs.get(name)}, is {value}"
            for name, value in {**usual, **self._identity()}.items()
            if theirs.get(name) != value
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
