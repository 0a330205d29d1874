"""The task of causal language modelling: predict each next token."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from blocks.compose import compose
from blocks.decoder import Decoder
from blocks.gating.base import Gating, Routing
from blocks.guests import distributions
from blocks.initialise import stable_seed
from blocks.kernels import choice
from blocks.kernels.cross_entropy import IGNORED
from blocks.mtp import later_targets
from blocks.shape import read
from interop import origin
from interop.source import load_part, load_weights
from registry.enforcing import enforced
from registry.ranges import NonNegative, Whole
from training.cadence import logs_now, validate_by_steps
from training.metrics import ExpertLoad, Sums, TokenLoss
from training.optimizers.base import OptimizerRecipe
from training.parallel.build import build
from training.parallel.clipping import clip
from training.parallel.local import is_distributed, is_low
from training.parallel.ranks import DataRanks, balance_over, data_ranks
from training.parallel.recompute import Recompute, check, recompute
from training.schedulers.base import Schedule
from training.step_mean import StepMean

Batch = dict[str, Tensor]
STAGES = ("train", "val", "test")


@enforced("task")
class CausalLM(L.LightningModule):
    """A decoder composed from a configuration, trained on the next token.

    The loss of an optimizer step is the mean over all of its scored tokens, of all micro-batches on all ranks, plus
    the loss of multi-token prediction, each depth a mean over the tokens that it scores, plus the balance losses of
    the gating blocks. A balance loss is computed for each micro-batch and averaged over them by their sequences;
    see docs/how-to/scale.md. Validation counts the text only.

    Args:
        model: composition of the decoder, as plain types (the ``model`` node)
        optimizer: recipe of the optimizer
        scheduler: factor on the learning rate over the steps
        seed: of the initial weights and of every random draw of training
        init_from: folder of an imported checkpoint whose weights to start from; null for random ones. A run that goes
            on from a checkpoint of its own has those instead
        activation_checkpointing: ``full``: layers keep their input alone and compute the rest anew for the gradient;
            ``selective``: feed-forward blocks alone do; ``none``
        kernels: kernel → implementation, where the automatic choice for the device is not wanted
        z_loss: weight of the mean of log² Z, Z the sum of the exponentials of a token's logits; 0 for none. PaLM has
            1e-4. The depths of multi-token prediction go without
        compile: whether layers are compiled for training, and for validation within it; ``trainer.compile`` sets it
    """

    def __init__(
        self,
        model: dict[str, Any],
        optimizer: OptimizerRecipe,
        scheduler: Schedule,
        seed: Whole = 0,
        init_from: str | None = None,
        activation_checkpointing: Recompute = "none",
        kernels: dict[str, str] | None = None,
        z_loss: NonNegative = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check(activation_checkpointing)
        self.activation_checkpointing: Recompute = activation_checkpointing
        self.z_loss, self.compiled = z_loss, compile
        self.model_config = read(model)
        self.recipe, self.schedule, self.seed, self.init_from = optimizer, scheduler, seed, init_from
        self.kernels = choice.check(kernels or {}, "task.kernels")
        # Plain types only: a checkpoint must load under weights_only=True and rebuild its model with no YAML at hand.
        self.save_hyperparameters({"model": self.model_config, "seed": seed})
        self.decoder: Decoder | None = None
        # Checkpoints hold what training has summed since it last logged: a resumed run logs what it would have.
        self.losses = nn.ModuleDict(
            {f"{stage}_loss": TokenLoss(stage == "train", only_finite=stage == "train") for stage in STAGES}
        )
        self.loads = nn.ModuleDict()
        self.origin: dict[str, Any] = {}  # of the weights; see interop/origin.py
        self._step = StepMean(self._counts)
        self._step_load: dict[str, Tensor] = {}
        self._settings: list[dict[str, Any]] = []  # of the optimizer's groups, as configured
        self.expert_shares: dict[str, Tensor] = {}  # layer → share of choices of each expert, when last logged

    def configure_model(self) -> None:
        """Build the decoder: on the meta device first, then materialised (Lightning may call this twice)."""
        if self.decoder is None:
            self.decoder = self._build().choose_kernels(self.kernels)
            balance_over(self.decoder, self._ranks())
            for stage in STAGES:
                gates = self._gates(further=stage == "train")
                loads = {k: ExpertLoad(gate.n_experts, stage == "train") for k, gate in gates.items()}
                self.loads[f"{stage}_load"] = nn.ModuleDict(loads)

    def _build(self) -> Decoder:
        if self.init_from is not None:
            self.origin = origin.read(Path(self.init_from))
        sharding = getattr(self._trainer and self._trainer.strategy, "sharding", None)
        if sharding is not None:
            fill = None if self.init_from is None else partial(load_part, folder=Path(self.init_from))
            return build(self.model_config, self.seed, sharding, self.activation_checkpointing, fill)
        decoder = compose(self.model_config, seed=self.seed)
        if self.init_from is not None:
            load_weights(decoder, Path(self.init_from))
        for layer in [*decoder.layers, *decoder.mtp]:
            recompute(layer, self.activation_checkpointing)
        return decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B,T] → logits [B,T,V]."""
        return self._decoder()(tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what it takes to read this: the distributions of guest blocks, and whose state the optimizer keeps.

        What training has summed since it last logged is written as the sum over all ranks.
        """
        checkpoint["distributions"] = distributions(self.model_config)
        if self.origin:
            checkpoint["origin"] = self.origin
        for path, metric in self._sums():
            for name in metric.state_dict():
                checkpoint["state_dict"][f"{path}.{name}"] = self._ranks().sum(getattr(metric, name))
        names = {id(parameter): name for name, parameter in self._decoder().named_parameters()}
        checkpoint["optimizer_parameters"] = [
            [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            for optimizer in self.trainer.optimizers
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember where the weights first came from: a resumed run does not read ``init_from`` again."""
        self.origin = checkpoint.get("origin", {})

    def on_train_start(self) -> None:
        """Give the optimizer the settings of this run: a checkpoint restores those of the run that wrote it."""
        if self._ranks().index:  # a checkpoint's sums are those of all ranks: the first keeps them
            for _, metric in self._sums():
                metric.reset()
        self._step.end()
        validate_by_steps(self.trainer, self.trainer.global_step)
        scheduler = cast(LambdaLR, self.trainer.lr_scheduler_configs[0].scheduler)
        scheduler.base_lrs = [settings["lr"] for settings in self._settings]
        for group, settings, factor in zip(
            self.trainer.optimizers[0].param_groups, self._settings, scheduler.lr_lambdas, strict=True
        ):
            peak = settings["lr"]
            group.update(settings, initial_lr=peak, lr=peak * factor(scheduler.last_epoch))

    def on_fit_start(self) -> None:
        if self.compiled:
            from training.compiling import compile_layers

            compile_layers(self._decoder())

    def on_fit_end(self) -> None:
        if self.compiled:
            from training.compiling import run_as_written

            run_as_written(self._decoder())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # The state of the generator is a function of where training stands: a resumed run draws what it would have.
        torch.manual_seed(stable_seed(self.seed, f"{self.current_epoch}/{batch_idx}/{self._ranks().index}"))
        self._step.begin(self.trainer, batch, self._ranks(), self.device)
        validate_by_steps(self.trainer, self.trainer.global_step + 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden, total, z, tokens, routings = self._predict(batch, self.z_loss)
        self._loss("train").update(total.detach() - self.z_loss * z, tokens, batch["n_bytes"].sum())
        losses: dict[str, Tensor] = {}
        if len(self._decoder().mtp):
            losses["mtp"], further = self._predict_further(batch, hidden)
            routings = [*routings, *further]
        share = self._step.share(len(batch["tokens"]), "sequences")
        for layer, routing in self._routed(routings):
            self._load("train", layer).update(routing.load)
            self._step_load[layer] = self._step_load.get(layer, 0) + routing.load
            for name, value in routing.losses.items():
                losses[name] = losses.get(name, 0) + value * share
        logit_z = {"logit_z": self._step.mean(self.z_loss * z, "tokens")} if self.z_loss else {}
        self._step.record({**losses, **logit_z}, self.trainer.accumulate_grad_batches)
        if logs_now(self.trainer):
            self._log_training()
        return self._step.mean(total, "tokens") + sum(losses.values(), torch.zeros_like(total))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let every gate see the load of all micro-batches on all ranks, once.

        A step that was skipped moves no gate either: its gradients were taken away, or they overflowed in fp16, and
        the scaler did not step but lowered its scale.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler else 1.0
        super().optimizer_step(*args, **kwargs)
        overflowed = scaler is not None and scaler.get_scale() < scale
        stepped = not overflowed and any(p.grad is not None for p in self.parameters())
        for layer, gate in self._gates().items():
            if layer in self._step_load and stepped:
                gate.update(self._ranks().sum(self._step_load[layer]))
        self._step_load.clear()
        self._step.end()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own cannot mix meshes, and rounds the norm to the precision of the gradients.
        if gradient_clip_val and (is_distributed(self._decoder()) or is_low(self._decoder())):
            clip(self._decoder().parameters(), float(gradient_clip_val), gradient_clip_algorithm or "norm")
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_start(self) -> None:
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        self._begin("test")

    def on_validation_epoch_end(self) -> None:
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        self._conclude("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The likeliest next token after each, [B,T]."""
        return self(batch["tokens"]).argmax(-1)

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        steps = int(steps) if math.isfinite(steps) else -1  # without an end, which some schedules bear
        self.schedule.check(steps)
        optimizer = self.recipe.build(self._decoder())
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _predict(
        self, batch: Batch, z_loss: NonNegative = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Routing | None]]:
        """Hidden states, summed nll plus z_loss · z, z = Σ log² Z, number of scored tokens, routing of each layer."""
        decoder, segments = self._decoder(), batch.get("segments")
        # One document a row starts at position 0 everywhere: shared positions are cheaper to turn by.
        positions = batch["positions"] if segments is not None else None
        hidden, routings = decoder.hidden(batch["tokens"], positions, segments)
        return (
            hidden,
            *decoder.nll_and_z(hidden, batch["targets"], z_loss),
            (batch["targets"] != IGNORED).sum(),
            routings,
        )

    def _predict_further(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, list[Routing | None]]:
        """The weighted loss of multi-token prediction, a mean over its depths, and the routing of their layers."""
        decoder, segments = self._decoder(), batch.get("segments")
        positions = batch["positions"] if segments is not None else batch["positions"][:1]
        depths, routings = decoder.mtp_nll(hidden, batch["tokens"], batch["targets"], positions, segments)
        means = [self._step.mean(nll, f"mtp{k}") for k, (nll, _) in enumerate(depths, start=1)]
        return self.model_config["mtp"]["loss_weight"] * torch.stack(means).mean(), routings

    def _counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the terms of the loss are means over: scored tokens, of each depth too, and sequences."""
        targets, segments = batch["targets"], batch.get("segments")
        counts = {"tokens": (targets != IGNORED).sum(), "sequences": targets.new_tensor(len(targets))}
        for k in range(1, len(self._decoder().mtp) + 1):
            counts[f"mtp{k}"] = (later_targets(targets, segments, k) != IGNORED).sum()
        return counts

    def _begin(self, stage: str) -> None:
        self._loss(stage).reset()
        for layer in self._gates(further=stage == "train"):
            self._load(stage, layer).reset()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        _, nll, _, tokens, routings = self._predict(batch)
        self._loss(stage).update(nll, tokens, batch["n_bytes"].sum())
        for layer, routing in self._routed(routings):
            self._load(stage, layer).update(routing.load)

    def _conclude(self, stage: str) -> None:
        values = self._loss(stage).compute()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss")
        self._log_loads(stage)

    def _log_training(self) -> None:
        """The means since the last time, and the further terms of this step's loss."""
        metric = self._loss("train")
        values = metric.compute()
        metric.reset()
        self.log("train/loss", values["loss"].float(), prog_bar=True)
        self.log("train/bits_per_byte", values["bits_per_byte"].float())
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log_dict({f"train/{name}": value for name, value in self._step.figures(self._ranks()).items()})
        self._log_loads("train")

    def _log_loads(self, stage: str) -> None:
        for layer in self._gates(further=stage == "train"):
            metric = self._load(stage, layer)
            values = metric.compute()
            self.expert_shares[layer] = values.pop("shares").float().cpu()
            self.log_dict({f"{stage}_load/layer{layer}/{name}": value.float() for name, value in values.items()})
            metric.reset()

    def _sums(self) -> list[tuple[str, Sums]]:
        """The metrics that checkpoints hold, which are those of training, by path."""
        return [(path, m) for path, m in self.named_modules() if isinstance(m, Sums) and m.state_dict()]

    def _ranks(self) -> DataRanks:
        return DataRanks() if self._trainer is None else data_ranks(self._trainer)

    def _gates(self, further: bool = True) -> dict[str, Gating]:
        """Index of each layer that routes → its gate; with those of multi-token prediction, or without."""
        decoder, found = self._decoder(), {}
        depths = [depth.layer for depth in decoder.mtp] if further else []
        for i, layer in enumerate([*decoder.layers, *depths]):
            gates = [m for m in layer.modules() if isinstance(m, Gating)]
            if gates:
                found[str(i)] = gates[0]
        return found

    @staticmethod
    def _routed(routings: list[Routing | None]) -> list[tuple[str, Routing]]:
        return [(str(i), routing) for i, routing in enumerate(routings) if routing is not None]

    def _decoder(self) -> Decoder:
        assert self.decoder is not None, "configure_model has not run"
        return self.decoder

    def _loss(self, stage: str) -> TokenLoss:
        return cast(TokenLoss, self.losses[f"{stage}_loss"])

    def _load(self, stage: str, layer: str) -> ExpertLoad:
        return cast(ExpertLoad, cast(nn.ModuleDict, self.loads[f"{stage}_load"])[layer])
