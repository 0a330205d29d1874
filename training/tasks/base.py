"""A task without its loss: everything about training a decoder that is independent of the objective."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from blockwright.blocks.checkpoint.read import distributions
from blockwright.blocks.compose import read
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Share
from blockwright.blocks.initialise import stable_seed
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.kernels.scoring import is_real
from blockwright.blocks.precision import KeepsDtype
from blockwright.registry import Composable, ConfigError, family
from blockwright.training.cadence import logs_now, validate_by_steps
from blockwright.training.checkpoints.resume import between_steps
from blockwright.training.compiling import Compiling
from blockwright.training.data.modules.batches import DataModule
from blockwright.training.data.tokenizers.rebuild import check_start
from blockwright.training.figure import OF_TEXT, TRAIN, Figure, find, names_in, refuse_contradictions
from blockwright.training.metrics import ExpertLoad, Sums, TokenLoss
from blockwright.training.parallel.collectives import clip, has_sparse
from blockwright.training.parallel.context import Context
from blockwright.training.parallel.local import is_distributed, is_low
from blockwright.training.parallel.ranks import DataRanks, balance_over, data_ranks
from blockwright.training.starts import freeze
from blockwright.training.tasks import making
from blockwright.training.tasks.making import CONTEXT, Setup, lower_only_weights
from blockwright.training.tasks.means import BySource, Counted, Scored, StepMean, micro_batches_to_come
from blockwright.training.tasks.routing import RoutingLoads, balance_losses

Batch = dict[str, Tensor]
Sample = tuple[str, str, float | None]  # prompt, completion, and its reward
SEQUENCES = "sequences"  # the count that weighs balance losses
STAGES = ("train", "val", "test")


@family("task", root="", context=CONTEXT)
class Task(Composable, KeepsDtype, L.LightningModule):
    """A decoder composed from a configuration, and its training. A subclass defines ``objective`` and ``counts``.

    Registered as ``@register("task", NAME)`` it is the option ``task=NAME``; its constructor is its schema, as a
    block's is. What the run knows comes as ``setup``.

    The loss of an optimizer step is a mean over everything scored, in all micro-batches on all ranks, plus further
    terms, each with its own mean, plus the balance losses of the gating blocks. A balance loss is computed per
    micro-batch and averaged weighted by their sequences; see docs/how-to/scale.md.

    All that an optimizer step changes (weights, gates, sums, counts, and what callbacks do in ``on_step_end``) changes
    after the last hook of the step and before it is counted. So a checkpoint is that of its ``global_step``, whichever
    hook writes it.

    A trainer's low precision lowers the weights of the decoder: neither batches, nor buffers of the task, nor tensors
    made from Python numbers.

    Args:
        setup: the model and how it is trained

    Class attributes:
        figures: what the task logs, each with its unit and whether more or less of it is better. Of the three that this
            class measures, a task leaves out those that mean nothing for it, and they are not logged
        always: what every task logs besides. Terms of the loss are declared by being logged
        shown: what progress shows of ``train/<name>``
        curves: what the report draws besides the loss: file → names of logged figures
        reads: keys that a training batch must have
        splits: whether ``objective`` scores the tokens of ``share`` alone; else a training whose ranks share windows
            (context parallelism) is refused
        steady: whether its training batches have few shapes; else ``compile`` is refused, for each would be compiled
        improves: whether it chooses among what a model can do already, so that random weights are refused
    """

    figures: ClassVar[tuple[Figure, ...]] = OF_TEXT
    always: tuple[Figure, ...] = (Figure("lr", "", None, TRAIN), *ExpertLoad.figures)
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    curves: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    reads: ClassVar[tuple[str, ...]] = ("tokens", "targets")
    splits: ClassVar[bool] = False
    steady: ClassVar[bool] = True
    improves: ClassVar[bool] = False

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        if setup.compile is True and not self.steady:
            rule = f"layers are compiled for each shape, and nearly every batch of {type(self).__name__} has another"
            raise ConfigError("trainer.compile", True, rule, "Write trainer.compile=false")
        self.model_config = read(setup.model)
        self.configured = replace(setup, model=self.model_config)
        self.schedule, self.seed = setup.scheduler, setup.seed
        # Plain types only: a checkpoint must load under weights_only=True and rebuild its model without YAML.
        recorded = {key: value for start in setup.starts for key, value in start.record().items()}
        self.save_hyperparameters({**recorded, "model": self.model_config, "seed": setup.seed})
        self.decoder: Decoder | None = None
        # Running sums are checkpointed, so a resumed run logs the same values.
        self.losses = nn.ModuleDict(
            {f"{stage}_loss": TokenLoss(stage == "train", only_finite=stage == "train") for stage in STAGES}
        )
        self.loads = RoutingLoads()
        self.origin: dict[str, Any] = {}  # of the weights; see blocks/checkpoint/manifest.py
        self._compiled: bool | None = None  # whether layers are, once that is chosen
        self.step = StepMean()
        self.counted = Counted()
        self._measured_in_step: list[tuple[Tensor, Tensor, Tensor]] = []  # nats, tokens and bytes of micro-batches
        self._by_source = BySource()
        self._groups: list[dict[str, Any]] = []  # settings of the optimizer's groups, as configured

    # --- defined by subclasses ------------------------------------------------------------------------------------

    @abstractmethod
    def objective(self, batch: Batch, stage: str) -> Scored:
        """Score a micro-batch.

        Args:
            batch: from the data module
            stage: ``train``, ``val`` or ``test``; in the last two only ``total``, ``count``, ``logged`` and
                ``routings`` are read
        """

    def prepare(self, batch: Batch) -> None:
        """Make what a step needs of a batch, such as samples of the model.

        Called for all batches of a step before the first of them is counted.
        """

    def samples(self) -> Sequence[Sample]:
        """Texts of the last validation to show: prompt, completion and reward, None for none."""
        return ()

    def rises(self) -> Mapping[str, Tensor]:
        """What the last step did to the texts that it trained on, by name of the figure; all ranks must call it."""
        return {}

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Denominators of the loss terms: name → their number in a batch, an integer tensor (a sum of weights: any).

        Called for all batches of a step before its first forward pass. ``"total"`` corresponds to ``Scored.count``.
        """

    def tokens_of(self, batch: Batch) -> int | Tensor:
        """How many tokens training on a batch computes, without padding, for figures of speed."""
        segments = batch.get("segments")
        return batch["tokens"].numel() if segments is None else is_real(segments).sum()

    def take_sampled(self) -> tuple[int, float]:
        """Tokens sampled for training since the last call, and the seconds that took."""
        return 0, 0.0

    # --- the model ------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the decoder: on the meta device first, then materialised (Lightning may call this twice)."""
        if self._trainer is not None:
            lower_only_weights(self.trainer.precision_plugin)
        if self.decoder is None:
            self.decoder = self._make().choose_kernels(self.configured.kernels)
            freeze(self.decoder, self.configured.frozen)
            context = self.context
            together = DataRanks() if context is None else DataRanks(context.size, context.rank, context.group)
            balance_over(self.decoder, self.ranks(), together)
            self.loads.fill(self.decoder, STAGES)

    @property
    def reads_starts(self) -> bool:
        """Whether the weights are those to start from, and not those of the trainer's ``ckpt_path``.

        Before the model is built, a trainer holds a path that was assigned to it, and still the last one that was an
        argument, which it will not read again.
        """
        return self._trainer is None or not self._trainer._checkpoint_connector._user_managed

    def _make(self) -> Decoder:
        setup, data = self.configured, getattr(self._trainer, "datamodule", None)
        if self.reads_starts:
            self.origin = {key: value for start in setup.starts for key, value in start.origin().items()}
            if setup.trained is not None and isinstance(data, DataModule) and data.tokenizer is not None:
                check_start(setup.trained, data.tokenizer)  # known only now, if it was fitted
        sharding = getattr(self._trainer and self._trainer.strategy, "sharding", None)
        if sharding is not None:
            return making.sharded(setup, self.reads_starts, sharding)
        return making.whole(setup, self.reads_starts, data)

    @property
    def model(self) -> Decoder:
        """The decoder, after ``configure_model``."""
        assert self.decoder is not None, "configure_model has not run"
        return self.decoder

    @property
    def expert_shares(self) -> dict[str, Tensor]:
        """Layer → share of choices of each expert, when last logged."""
        return self.loads.shares

    @property
    def as_in_a_step(self) -> AbstractContextManager[None]:
        """Context in which the decoder computes as in a step, autocast included: for hooks outside of one."""
        return self.trainer.precision_plugin.forward_context()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B,T] → logits [B,T,V]."""
        return self.model(tokens)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The likeliest next token after each, [B,T]."""
        given = (batch["tokens"], batch.get("positions"), batch.get("segments"))
        return self.model(*given, media=self.model.media(batch)).argmax(-1)

    # --- training -------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        refuse_contradictions(self.trainer)
        asked = self.configured.compile if self.steady else False
        chosen = asked if asked != "auto" or self._compiled is None else self._compiled  # as before it was stopped
        self._compiling = Compiling(self.model, chosen)

    def on_fit_end(self) -> None:
        self._compiling.end()

    def on_train_start(self) -> None:
        """Give the optimizer this run's settings: a checkpoint restores those of the run that wrote it."""
        if self.ranks().index:  # a checkpoint's sums are over all ranks: only the first keeps them
            for _, metric in self._sums():
                metric.reset()
        self._forget_step()
        validate_by_steps(self.trainer, self.trainer.global_step)
        scheduler = cast(LambdaLR, self.trainer.lr_scheduler_configs[0].scheduler)
        scheduler.base_lrs = [settings["lr"] for settings in self._groups]
        for group, settings, factor in zip(
            self.trainer.optimizers[0].param_groups, self._groups, scheduler.lr_lambdas, strict=True
        ):
            peak = settings["lr"]
            group.update(settings, initial_lr=peak, lr=peak * factor(scheduler.last_epoch))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._check_keys(batch)
        self._check_ids(batch)
        self._compiled = self._compiling.decide(self.trainer, batch["tokens"].shape, self.device)
        # The generator's state is a function of the position in training, so a resumed run draws the same.
        torch.manual_seed(stable_seed(self.seed, f"{self.current_epoch}/{batch_idx}/{self.ranks().index}"))
        if not self.step.begun:
            self._begin_step([batch, *micro_batches_to_come(self.trainer)])
        validate_by_steps(self.trainer, self.trainer.global_step + 1)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check_ids(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check_ids(batch)

    def _check_ids(self, batch: Any) -> None:
        """Refuse ids that the vocabulary has not, of which a loss would be no figure.

        On a CPU alone: a GPU would be waited for, and its loss is then NaN (blocks/kernels/cross_entropy.py).
        """
        known = self.model_config["vocab_size"]
        for key in ("tokens", "targets") if isinstance(batch, Mapping) else ():
            ids = batch.get(key)
            if not isinstance(ids, Tensor) or ids.device.type != "cpu" or key not in self.reads:
                continue
            odd = ids[(ids < 0) | (ids >= known)]
            odd = odd[odd != IGNORED] if key == "targets" else odd
            if odd.numel():
                unscored = f", or {IGNORED} where no token is scored" if key == "targets" else ""
                rule = f"gives the {key[:-1]} {odd[0].item()}, and ids of this model are 0 to {known - 1}{unscored}"
                raise ConfigError("data", self._source(), rule, "Correct the ids, or set model.vocab_size")

    def _check_keys(self, batch: Any) -> None:
        """Refuse a batch that is no mapping with the keys that this task reads."""
        held = batch if isinstance(batch, Mapping) else {}
        if not (lacking := [key for key in self.reads if key not in held]):
            return
        gives = (
            f"gives batches without {', '.join(lacking)}" if held else f"gives batches of type {type(batch).__name__}"
        )
        rule = f"{gives}, and {type(self).__name__} reads a mapping with {', '.join(self.reads)}"
        remedy = "Choose other data, or another task; in your own loader, collate what docs/how-to/lightning.md lists"
        raise ConfigError("data", self._source(), rule, remedy)

    def _source(self) -> str:
        """The class that the batches come from."""
        data, loader = getattr(self.trainer, "datamodule", None), self.trainer.train_dataloader
        return type(data if data is not None else getattr(loader, "dataset", loader)).__name__

    def _begin_step(self, batches: Sequence[Batch]) -> None:
        self.model.begin_step(stable_seed(self.seed, f"step {self.trainer.global_step}"))  # the same on all ranks
        for batch in batches:
            self.prepare(batch)
        counts = [{**self.counts(batch), SEQUENCES: sequences_of(batch)} for batch in batches]
        self.step.begin(counts, self.trainer.accumulate_grad_batches, self.ranks(), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        scored = self.objective(batch, "train")
        self._measured_in_step.append(self._sums_of(scored, batch))
        self.loads.add_to_step(scored.routings, self.model)
        terms = dict(scored.terms)
        share = self.step.share(sequences_of(batch), SEQUENCES)
        terms |= {name: value * share for name, value in balance_losses(scored.routings, self.model).items()}
        # Declare terms of the loss, whose names are those of blocks
        for name in terms:
            if find(f"train/{name}", (*self.figures, *self.always)) is None:
                self.always = (*self.always, Figure(name, "of the loss", "less", TRAIN))
        self.step.record({**terms, **scored.figures}, self.trainer.accumulate_grad_batches)
        return self.step.mean(scored.total, "total") + sum(terms.values(), torch.zeros_like(scored.total))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update every gate with the load of all micro-batches on all ranks, once.

        A skipped step updates no gate either: its gradients were removed, or they overflowed in fp16, and the scaler
        only lowered its scale.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler else 1.0
        super().optimizer_step(*args, **kwargs)
        overflowed = scaler is not None and scaler.get_scale() < scale
        stepped = not overflowed and any(p.grad is not None for p in self.parameters())
        self._end_step(stepped)

    def _end_step(self, stepped: bool) -> None:
        """Count the step before any hook follows that may write a checkpoint."""
        for sums in self._measured_in_step:
            self._loss("train").update(*sums)
        self.loads.end_step(self.model, self.ranks(), stepped)
        self.counted.end_step()
        if logs_now(self.trainer):
            self._log_training()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if (act := getattr(callback, "on_step_end", None)) is not None:
                act(self.trainer, self, self.trainer.global_step + 1)
        self._forget_step()

    def _forget_step(self) -> None:
        """Drop what was added up over the micro-batches of a step."""
        self._measured_in_step.clear()
        self.loads.forget_step()
        self.counted.forget_step()
        self.step.end()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own cannot mix meshes, and rounds the norm to the precision of the gradients.
        model = self.model
        if gradient_clip_val and (is_distributed(model) or is_low(model) or has_sparse(model.parameters())):
            clip(model.parameters(), float(gradient_clip_val), gradient_clip_algorithm or "norm")
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        steps = int(steps) if math.isfinite(steps) else -1  # no end, which some schedules support
        self.schedule.check(steps)
        optimizer = self.configured.recipe.build(self.model)
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- measuring ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        self._begin("test")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure("val", self.objective(batch, "val"), batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure("test", self.objective(batch, "test"), batch)

    def on_validation_epoch_end(self) -> None:
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        self._conclude("test")

    def _begin(self, stage: str) -> None:
        self._loss(stage).reset()
        data = self._data if stage == "val" else None
        self._by_source.begin({} if data is None else data.val_weights, self.device)
        self.loads.reset(stage)

    def _measure(self, stage: str, scored: Scored, batch: Batch, loader: int = 0) -> None:
        sums = self._sums_of(scored, batch)
        self._loss(stage).update(*sums)
        self._by_source.add(loader, *sums)
        self.loads.add(stage, scored.routings, self.model)

    def _sums_of(self, scored: Scored, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Nats, tokens and bytes of a micro-batch."""
        total = scored.total.detach() if scored.logged is None else scored.logged.detach()
        counted = "n_bytes" in batch and (self.context is None or self.context.rank == 0)  # of whole windows
        n_bytes = batch["n_bytes"].sum() if counted else torch.zeros_like(scored.count)
        return total, scored.count, n_bytes

    def _conclude(self, stage: str) -> None:
        for name, value in {**self._loss(stage).compute(), **self._by_source.figures()}.items():
            if "/" in name or name in names_in(stage, self.figures):
                self.log(f"{stage}/{name}", value.float())
        self.log_dict(self.loads.figures(stage))
        if stage == "val":
            self._log_data()  # the last step need not be one at which training logs

    def _log_data(self) -> None:
        """Log the figures of the data itself until now."""
        if (data := self._data) is not None:
            begun = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            self.log_dict(dict(data.figures_at(begun)))

    def _log_training(self) -> None:
        """Log the means since the last time, and the further terms of this step's loss."""
        metric = self._loss("train")
        values = metric.compute()
        metric.reset()
        for name, value in values.items():
            if name in names_in("train", self.figures):
                self.log(f"train/{name}", value.float())
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        for name, value in self.step.figures(self.ranks()).items():
            self.log(f"train/{name}", value)
        self.log_dict(self.loads.figures("train"))
        self._log_data()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what loading needs: plug-in packages, optimizer parameter names, sums over all ranks, counts."""
        if "fit_loop" in checkpoint.get("loops", {}):
            between_steps(self.trainer, checkpoint["loops"]["fit_loop"])
        checkpoint["compiled"] = self._compiled
        checkpoint["counted"] = self.counted.state_dict()
        checkpoint["distributions"] = distributions(self.model_config)
        for path, metric in self._sums():
            for name in metric.state_dict():
                checkpoint["state_dict"][f"{path}.{name}"] = self.ranks().sum(getattr(metric, name))
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        checkpoint["optimizer_parameters"] = [
            [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            for optimizer in self.trainer.optimizers
        ]
        if self.origin:
            checkpoint["origin"] = self.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.origin = checkpoint.get("origin", {})
        self._compiled = checkpoint.get("compiled")
        self.counted.load_state_dict(checkpoint.get("counted", {}))

    def _sums(self) -> list[tuple[str, Sums]]:
        """The metrics of training, which checkpoints store, by path."""
        return [(path, m) for path, m in self.named_modules() if isinstance(m, Sums) and m.state_dict()]

    @property
    def context(self) -> Context | None:
        """The ranks that share this one's windows; None if there are no others."""
        meshes = getattr(self._trainer and self._trainer.strategy, "meshes", None)
        return None if meshes is None else meshes.context

    def share(self, batch: Batch) -> Share | None:
        """This rank's tokens of a batch of whole windows; None if it has all of them."""
        return None if self.context is None else self.context.share(batch["tokens"].shape[1])

    def ranks(self) -> DataRanks:
        """The ranks that compute different tokens."""
        return DataRanks() if self._trainer is None else data_ranks(self._trainer)

    @property
    def _data(self) -> DataModule | None:
        """The trainer's data module, if it is one of ours."""
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, DataModule) else None

    def _loss(self, stage: str) -> TokenLoss:
        return cast(TokenLoss, self.losses[f"{stage}_loss"])


def sequences_of(batch: Batch) -> Tensor:
    """How many rows of a batch are not padding alone."""
    segments = batch.get("segments")
    return (
        torch.tensor(len(next(iter(batch.values()))), dtype=torch.int64)
        if segments is None
        else is_real(segments).any(1).sum()
    )
