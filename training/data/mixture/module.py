"""The data module of a mixture of token shards and corpora, ``data=mixture``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.utils.data import Dataset

from blockwright.registry import register
from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.ranges import Count, Positive
from blockwright.training.data.fingerprint import digest
from blockwright.training.data.mixture.order import (
    MOST_ROWS,
    STAGES,
    MixtureOrder,
    Schedule,
    Stage,
    read_stages,
    weights_of,
)
from blockwright.training.data.mixture.sources import Opened, Place, Source, overview, texts
from blockwright.training.data.mixture.tokens import Line, MixtureWindows, Rings, Stretch, Tokens, refuse_other
from blockwright.training.data.modules.batches import Batches, Feeding, RowDataModule
from blockwright.training.data.order import LineBatches
from blockwright.training.data.windows import Making
from blockwright.training.figure import Figure

PATH = "data.sources.{name}"
VAL_SHARES = "data.val_shares"
EVEN = "even"


@register("data", "mixture")
class MixtureDataModule(RowDataModule):
    """Next-token batches from several sources, mixed by shares that may change.

    The source and the window of every row of every batch are a function of the seed, the shares and the number of the
    batch: the same for any number of processes and after any resume. Each source is validated by itself.

    A batch is that of ``data=text``. There is no test split, and a run has a number of steps, not of epochs.

    Args:
        feeding: how rows are made into batches; a row is a window
        sources: name → shards of tokens (``files``) or a corpus (``corpus``), see training/data/mixture/sources.py
        stages: shares of the rows by source, and for how many batches: see training/data/mixture/order.py; null for
            shares by size
        most_epochs: refuse a run that reads a source more often; by source, or for all; null for any
        val_shares: weights of the sources in ``val/loss``: ``even``, or by source. They are not those of training, so
            that runs with other shares compare
        stands_for: tokens of the longer run that this one stands for: each source is cut so that it is repeated as
            often as there; null for no cut
        digests: by which a resumed run compares the sources: ``sizes`` of their files, or ``contents``, all of them
            read before the run
        documents: ``apart``: documents in one window do not see each other; ``joined``: a window is one document
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("{source}/loss", "nats per token", "less", ("val",)),
        Figure("{source}/bits_per_byte", "bits per byte", "less", ("val",)),
        Figure("{source}/tokens", "tokens", None, ("data",)),
        Figure("{source}/epochs", "epochs", None, ("data",)),
        Figure("stage", "", None, ("data",)),
    )

    def __init__(
        self,
        feeding: Feeding,
        sources: Mapping[str, Source],
        stages: Sequence[Mapping[str, Any]] | None = None,
        most_epochs: Positive | dict | None = 4,
        val_shares: str | dict = EVEN,
        stands_for: Count | None = None,
        digests: Literal["sizes", "contents"] = "sizes",
        documents: Literal["apart", "joined"] = "apart",
    ) -> None:
        super().__init__(feeding)
        _refuse_names(sources)
        self.sources, self.stages = dict(sorted(sources.items())), read_stages(stages, sources)
        self.most_epochs = _most(most_epochs, sources)
        self.val_shares = None if val_shares == EVEN else weights_of(val_shares, VAL_SHARES, sources)
        self.stands_for, self.digests, self.documents = stands_for, digests, documents
        self._opened: dict[str, Opened] = {}
        self._contents: dict[str, str] = {}
        self._n_batches = 0
        if not self.tokenizer.fitted:
            rule = "learns its vocabulary from a corpus, and a mixture has several"
            remedy = "Use data/tokenizer=bytes, or data/tokenizer=pretrained with the tokenizer.json of a trained one"
            raise ConfigError("data.tokenizer", self.tokenizer.kind, rule, remedy)

    # ---- checks -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        opened = {name: source.check(self._place(name)) for name, source in self.sources.items()}
        self._opened = {name: each for name, each in opened.items() if each is not None}
        _refuse_shared(self._opened)
        for name, each in self._opened.items():
            for key, tokens in (("files", each.train), ("val", each.val)):
                if tokens is not None and not each.made_by_ours:
                    refuse_other(tokens, self.tokenizer, f"{PATH.format(name=name)}.{key}")
                if tokens is not None:
                    self._refuse_short(name, tokens)

    def check_run(self, batches: int | None) -> None:
        if batches is None:
            raise ConfigError("trainer.max_steps", -1, "a mixture has no end, so a run needs one", self._one_epoch())
        self._n_batches = batches
        if batches * self.batch_size >= MOST_ROWS:
            rule = f"with batches of {self.batch_size} the run has more rows than the {MOST_ROWS:,} that can be mixed"
            raise ConfigError("trainer.max_steps", batches, rule, "Lower it, or lengthen data.sequence_length")
        self._refuse_late_stages(batches)
        if len(self._opened) == len(self.sources):
            self._forget_order()
            self._refuse_repetition(batches)

    def _one_epoch(self) -> str:
        if not self._opened:
            return "Write trainer.max_steps=…"
        name, tokens = max(
            ((name, each.train.n_tokens) for name, each in self._opened.items()), key=lambda pair: pair[1]
        )
        steps = -(-tokens // (self.sequence_length * self.batch_size))
        return f"Write trainer.max_steps=…; {steps:,} batches have as many tokens as {name}"

    def _refuse_late_stages(self, batches: int) -> None:
        begin = 0
        for i, stage in enumerate(self.stages or ()):
            if begin >= batches:
                rule = f"begins after {begin:,} batches, and the run has {batches:,}"
                remedy = "Raise trainer.max_steps, shorten the stages before it, or leave it out"
                raise ConfigError(f"{STAGES}.{i}", dict(stage.weights), rule, remedy)
            begin += stage.batches or 0

    def _refuse_repetition(self, batches: int) -> None:
        for name, epochs in self.order.epochs(batches).items():
            most = self.most_epochs[name]
            if most is not None and epochs > most:
                rule = f"{name} would be read {epochs:.3g} times"
                remedy = (
                    f"Lower its share, or write 'data.most_epochs={{{name}: {-(-epochs // 1):.0f}}}' if that is meant"
                )
                raise ConfigError("data.most_epochs", most, rule, remedy)

    def _refuse_short(self, name: str, tokens: Tokens) -> None:
        if tokens.n_tokens <= self.sequence_length:
            rule = f"{name} has {tokens.n_tokens:,} tokens, and a window and the token after it need more"
            remedy = f"Set data.sequence_length={max(tokens.n_tokens - 1, 2)} or less, or give it more"
            raise ConfigError("data.sequence_length", self.sequence_length, rule, remedy)

    def _refuse_unmeasured(self) -> None:
        for name in self.val_shares or ():
            if self._opened[name].val is None:
                rule = f"{name} has nothing to validate on, which val/loss would need"
                remedy = f"Give it data.sources.{name}.val or val_tokens, or no share of val_shares"
                raise ConfigError(f"{VAL_SHARES}.{name}", name, rule, remedy)

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> Place:
        return Place(PATH.format(name=name), self.tokenizer, self.cache_dir)

    def _prepare(self) -> None:
        self.check()
        prepared = {name: source.prepare(self._place(name)) for name, source in self.sources.items()}
        opened = {name: source.open(self._place(name), prepared[name]) for name, source in self.sources.items()}
        sizes = {name: digest(each.train.identity()) for name, each in opened.items()}
        contents = {name: each.train.contents() for name, each in opened.items() if self.digests == "contents"}
        self._read_fingerprint = json.dumps({"prepared": prepared, "sizes": sizes, "contents": contents})

    def setup(self, stage: str | None = None) -> None:
        """Open the sources, on every process.

        Args:
            stage: Lightning's stage

        Raises:
            ConfigError: the error of ``prepare_data`` on any process; for a source that is too short, or would be read
                too often; for batches that the processes cannot share
        """
        self._listen()
        if self._read_fingerprint is None:
            self._prepare()
        assert self._read_fingerprint is not None
        known = json.loads(self._read_fingerprint)
        self._contents = known["contents"]
        prepared = known["prepared"].items()
        self._opened = {name: self.sources[name].open(self._place(name), each) for name, each in prepared}
        for name, each in self._opened.items():
            self._refuse_short(name, each.train)
        self._refuse_unmeasured()
        self._forget_order()
        if self.trainer is not None and stage == "fit":
            batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
            if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a few steps of a longer run
                self._n_batches = batches
            else:
                self.check_run(batches if batches > 0 else None)
        self._begin(stage)

    @cached_property
    def _trained(self) -> dict[str, Tokens]:
        """The tokens of each source of a stage to train on, cut by ``stands_for``."""
        names = {name for stage in self.stages or () for name in stage.weights} or set(self.sources)
        return {name: self._cut(each.train) for name, each in self._opened.items() if name in names}

    def _cut(self, tokens: Tokens) -> Tokens:
        if self.stands_for is None or not self._n_batches:
            return tokens
        of_run = self._n_batches * self.batch_size * self.sequence_length
        if of_run > self.stands_for:
            rule = f"is less than the tokens of this run ({of_run:,}), which would stand for a longer one"
            raise ConfigError("data.stands_for", self.stands_for, rule, "Write the tokens of that run, or null")
        least = self.sequence_length + 1
        return Stretch(tokens, 0, max(least, tokens.n_tokens * of_run // self.stands_for))

    @cached_property
    def schedule(self) -> Schedule:
        """Which source each row comes from; needs ``setup``."""
        by_size = (Stage({name: tokens.n_tokens for name, tokens in self._trained.items()}),)
        return Schedule(self.stages or by_size, self.batch_size)

    @cached_property
    def order(self) -> MixtureOrder:  # type: ignore[override]
        sizes = tuple(self._trained[name].n_tokens for name in self.schedule.names)
        return MixtureOrder(self.schedule, sizes, self.sequence_length, self.seed, self._n_batches)

    def _forget_order(self) -> None:
        for name in ("_trained", "schedule", "order"):
            self.__dict__.pop(name, None)

    # ---- loaders ------------------------------------------------------------------------------------------------

    def _train_rows(self) -> Dataset[dict[str, Tensor]]:
        sources = {name: self._trained[name] for name in self.schedule.names}
        return self._rows(Rings(sources, self.tokenizer.vocab_size, PATH))

    def _rows(self, cutting: Rings | Line) -> MixtureWindows:
        making = Making(self.documents == "joined")
        bytes_of = self.tokenizer.token_bytes()
        return MixtureWindows(cutting, self.sequence_length, bytes_of, self.tokenizer.eos, making)

    def val_dataloader(self) -> list[Batches]:
        """The validation tokens of each source that has some, in order: a loader each."""
        return [self._validation(name) for name in self.val_weights]

    def _validation(self, name: str) -> Batches:
        tokens = self._opened[name].val
        assert tokens is not None
        line = (tokens.n_tokens, self.sequence_length, self.eval_batch_size, self.eval_windows)
        rows = self._rows(Line(name, tokens, self.tokenizer.vocab_size, PATH))
        return self._loader(rows, batch_sampler=LineBatches(*line, *self._share()))

    def test_dataloader(self) -> list[Batches]:
        """None: a mixture has no test split."""
        return []

    # ---- figures ------------------------------------------------------------------------------------------------

    @property
    def val_weights(self) -> Mapping[str, float]:
        measured = [name for name, each in self._opened.items() if each.val is not None]
        shares = dict.fromkeys(measured, 1) if self.val_shares is None else self.val_shares
        return {name: shares.get(name, 0) / sum(shares.values()) for name in measured}

    def figures_at(self, batch: int) -> Mapping[str, float]:
        if not self._n_batches:  # a model is measured only: there is no training whose length would cut the sources
            return {}
        tokens = {f"data/{n}/tokens": float(rows * self.sequence_length) for n, rows in self._rows_before(batch)}
        epochs = {f"data/{n}/epochs": read for n, read in self.order.epochs(batch).items()}
        return {**tokens, **epochs, "data/stage": float(self.schedule.stage(max(batch - 1, 0)) + 1)}

    def overview(self, batches: int | None) -> list[dict[str, str]]:
        return overview(self._opened, self.order, batches, self.tokenizer)

    def samples(self, n: int) -> list[tuple[str, str]]:
        return texts(self._opened, self.tokenizer, n)

    def _rows_before(self, batch: int) -> list[tuple[str, int]]:
        return [*zip(self.schedule.names, self.schedule.counts(batch), strict=True)]

    # ---- resuming -----------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **{name: value for name, value, usual in self._further() if value != usual},
        }

    def _further(self) -> list[tuple[str, Any, Any]]:
        return [("documents", self.documents, "apart")]

    def state_dict(self) -> dict[str, Any]:
        """As of ``RowDataModule``, and what determines the batches until now."""
        batch = self._consumed()
        read = [name for name, rows in self._rows_before(batch) if rows]
        return {
            **super().state_dict(),
            "mixture": {"prefix": self._prefix(batch), "read": read, "sources": self._states()},
        }

    def _prefix(self, batch: int) -> str:
        return self.schedule.prefix(batch)

    def _states(self) -> dict[str, dict[str, Any]]:
        """What each source is compared by."""
        return {
            name: {
                "n_tokens": tokens.n_tokens,
                "sizes": digest(tokens.identity()),
                "contents": self._contents.get(name),
            }
            for name, tokens in self._trained.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with this, as ``RowDataModule`` does.

        Raises:
            ConfigError: also at a source that has been read and is not there any more, or has other tokens
        """
        super().load_state_dict(state_dict)
        theirs, ours = state_dict.get("mixture", {}), self._states()
        for name in theirs.get("read", ()):
            if changed := _difference(theirs["sources"][name], ours.get(name)):
                remedy = "Name the same files; files to add are a source of their own, or begin a new run"
                rule = f"has other tokens than when the checkpoint was written ({changed})"
                raise ConfigError(PATH.format(name=name), name, rule, remedy)

    def changes(self, state_dict: Mapping[str, Any]) -> list[str]:
        past = state_dict.get("mixture", {}).get("prefix")
        same = past == self._prefix(state_dict["batches"])
        return [*super().changes(state_dict), *([] if same else ["shares until here were others"])]


def _difference(there: Mapping[str, Any], here: Mapping[str, Any] | None) -> str:
    """What differs between a source in a checkpoint and now; contents count only if both are known."""
    if here is None:
        return "no stage names it now"
    if there["n_tokens"] != here["n_tokens"]:
        return f"{there['n_tokens']:,}, now {here['n_tokens']:,}"
    if there["sizes"] != here["sizes"]:
        return "other names or sizes of files"
    known = None not in (there["contents"], here["contents"])
    return "other contents of files" if known and there["contents"] != here["contents"] else ""


def _refuse_names(sources: Mapping[str, Source]) -> None:
    if not sources:
        raise ConfigError(
            "data.sources", dict(sources), "names no source", "Write 'data.sources={web: {files: web/*.bin}}'"
        )
    for name in sources:
        if not re.fullmatch(r"[A-Za-z][\w-]*", str(name)):
            rule = "a source is named by a letter, then letters, digits, _ and -: it is part of names of figures"
            raise ConfigError("data.sources", name, rule, "Rename it")


def _most(value: Any, sources: Mapping[str, Source]) -> dict[str, float | None]:
    """The most epochs of each source."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(sources, value)
    for name, most in value.items():
        if name not in sources:
            raise ConfigError(f"data.most_epochs.{name}", most, "there is no such source", did_you_mean(name, sources))
        if most is not None and (isinstance(most, bool) or not isinstance(most, int | float) or not most > 0):
            rule = "counts epochs of a source, above 0, or is null"
            raise ConfigError(f"data.most_epochs.{name}", most, rule, "Write a number, or null for any")
    return {name: value.get(name, 4) for name in sources}


def _refuse_shared(opened: Mapping[str, Opened]) -> None:
    """Refuse a file that is named twice: by two sources, or to train and to validate on."""
    owners: dict[str, str] = {}
    for name, each in opened.items():
        for key, files in each.files.items():
            for file in files:
                path, real = f"{PATH.format(name=name)}.{key}", str(file.resolve())
                if real in owners:
                    rule = f"is also named by {owners[real]}"
                    raise ConfigError(path, str(file), rule, "Name each file once, and others to validate on")
                owners[real] = path
