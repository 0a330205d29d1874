"""What an engine needs to know of a training: optimizer, learning rates, batch, layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from blockwright.blocks.decoder import Decoder
from blockwright.lab.sweep.plan import overrides_of
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.registry import ConfigError
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.instantiate import build_readable
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.schedulers import Constant, Schedule, WarmupCosine, WarmupStableDecay

# Keys of the overrides of a run that matter here.
READ = re.compile(r"experiment|seed|data(\.batch_size|\.sequence_length)?|(optimizer|scheduler|trainer)([./].*)?")
REMEDY = "Give it on the command line: optimizer=adamw scheduler=warmup_cosine"
MISSING = "???"  # a value that the user has to give, in OmegaConf's terms


@dataclass(frozen=True)
class Rates:
    """Learning rates in the terms of Megatron's scheduler, which AutoModel has taken over.

    Args:
        style: of the decay: constant, cosine or WSD
        warmup: optimizer steps
        floor: learning rate at the end, as a fraction of the peak
        decay: optimizer steps of WSD's decay at the end
        shape: of that decay: minus_sqrt, linear or cosine
    """

    style: str
    warmup: int
    floor: float = 0.0
    decay: int | None = None
    shape: str | None = None


@dataclass(frozen=True)
class Training:
    """A training, as far as engines have the same.

    Args:
        folder: where config.json is
        has_weights: whether weights lie beside it
        n_layers, n_predicted: of the model, and its depths of multi-token prediction
        job, layout: GPUs, batch and length, and how they are spread
        steps: of the optimizer
        optimizer, rates, clip: how weights are changed; ``clip`` is the largest norm of the gradient
        seed: of weights and data
    """

    folder: Path
    has_weights: bool
    n_layers: int
    n_predicted: int
    job: Job
    layout: Layout
    steps: int
    optimizer: AdamW
    rates: Rates
    clip: float
    seed: int

    @property
    def tokenizer(self) -> str:
        """A folder with tokenizer files, if they are known."""
        return str(self.folder) if self.has_weights else MISSING


@dataclass(frozen=True)
class Settings:
    """A run's configuration, read as far as an engine takes it."""

    batch: int
    length: int
    steps: int
    optimizer: AdamW
    rates: Rates
    clip: float
    seed: int


def settings(run: Path, overrides: Sequence[str]) -> Settings:
    """The configuration of a run, changed by overrides; of anything else, the defaults changed by them.

    Raises:
        ConfigError: it cannot be composed, or has what the engines do not compute
    """
    node: Any = compose_config([*_readable_overrides(run), *overrides], output_dir=str(run))
    part = {key: OmegaConf.to_container(node[key], resolve=True) for key in ("optimizer", "scheduler", "trainer")}
    optimizer = build_readable(part["optimizer"], OptimizerRecipe, "optimizer", REMEDY)
    schedule = build_readable(part["scheduler"], Schedule, "scheduler", REMEDY)
    if not isinstance(optimizer, AdamW) or optimizer.multipliers:
        rule = "the engines compute AdamW with one learning rate, not this"
        raise ConfigError("optimizer", repr(optimizer), rule, "Write optimizer=adamw, optimizer.multipliers=null")
    trainer: dict[str, Any] = part["trainer"]  # type: ignore[assignment]
    clip = trainer["gradient_clip_val"]
    if not clip:
        rule = "the engines always clip gradients"
        raise ConfigError("trainer.gradient_clip_val", clip, rule, "Write trainer.gradient_clip_val=1.0")
    steps = trainer["max_steps"]
    schedule.check(steps)
    batch = node.data.batch_size * trainer["accumulate_grad_batches"]
    return Settings(batch, node.data.sequence_length, steps, optimizer, rates(schedule, steps), float(clip), node.seed)


def _readable_overrides(run: Path) -> list[str]:
    """The overrides of a run that this reads. Its folder may be untrusted: no other is composed, and none may be
    interpolated, which could read the environment.

    Raises:
        ConfigError: one of them is an interpolation
    """
    kept = []
    for override in overrides_of(run):
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if READ.fullmatch(key):
            if "${" in override:
                rule = "is an interpolation, which is not read from a run's folder"
                raise ConfigError(key, override[:200], rule, f"Give the value: {key}=VALUE")
            kept.append(override)
    return kept


def rates(schedule: Schedule, steps: int) -> Rates:
    """A schedule in the engines' terms, which reach each rate one step later.

    Raises:
        ConfigError: they have no such schedule
    """
    warmup = schedule.warmup_steps(steps)
    if isinstance(schedule, Constant):
        return Rates("constant", warmup)
    if isinstance(schedule, WarmupCosine):
        return Rates("cosine", warmup, schedule.min_ratio)
    if isinstance(schedule, WarmupStableDecay):
        shape = "minus_sqrt" if schedule.shape == "sqrt" else schedule.shape
        return Rates("WSD", warmup, schedule.min_ratio, schedule.decay_steps(steps), shape)
    rule = "the engines have no such schedule"
    remedy = "Write scheduler=warmup_cosine, warmup_stable_decay or constant"
    raise ConfigError("scheduler", type(schedule).__name__, rule, remedy)


def training(decoder: Decoder, given: Settings, job: Job, layout: Layout, folder: Path, has_weights: bool) -> Training:
    """Everything together."""
    return Training(
        folder=folder.absolute(),
        has_weights=has_weights,
        n_layers=len(decoder.layers),
        n_predicted=len(decoder.mtp),
        job=job,
        layout=layout,
        steps=given.steps,
        optimizer=given.optimizer,
        rates=given.rates,
        clip=given.clip,
        seed=given.seed,
    )


# --- an engine that takes a Hugging Face folder and a run configuration, and what it takes ----------------------------


@dataclass(frozen=True)
class Takes:
    """What an engine can do with a model_type, in values of ``lab.plan.search.CHOICES``; all others are free."""

    sizes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        title: its name
        file: of the run configuration
        families: model_type → the sizes it is limited to
        write: the run configuration of a training
    """

    title: str
    file: str
    families: Mapping[str, Takes]
    write: Callable[[Training, str], dict[str, Any]]

    def sizes(self, model_type: str, chosen: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
        """The sizes to search over: those that the user chose, within those that it takes.

        Raises:
            ConfigError: it has no such model, or takes none of the chosen values of a size
        """
        if model_type not in self.families:
            rule = f"{self.title} has no model of this model_type"
            raise ConfigError("--to", f"{self.title} with {model_type!r}", rule, f"It has {', '.join(self.families)}")
        found = {key: tuple(values) for key, values in chosen.items()}
        for key, taken in self.families[model_type].sizes.items():
            left = tuple(v for v in found.get(key, taken) if v in taken)
            if not left:
                rule = f"{self.title} does not do this with {model_type}"
                values = ",".join(map(str, found[key]))
                raise ConfigError(
                    key, values, rule, f"Write {key}={','.join(map(str, taken)).lower()}, or leave it out"
                )
            found[key] = left
        return found

    def text(self, training: Training, model_type: str) -> str:
        """The file, with a line that says what it is."""
        layout = f"{training.job.gpus:,} GPUs, {training.layout}"
        head = (
            f"# A run configuration for {self.title}: {layout}. ??? is to be filled in. Not yet run with that engine.\n"
        )
        return head + OmegaConf.to_yaml(OmegaConf.create(self.write(training, model_type)))
