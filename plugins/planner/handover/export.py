"""Hand a model and its training over: plan the layout, write the folder, say what was written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from blockwright.blocks.checkpoint.source import open_source
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.lab.models import load
from blockwright.plugins.hub.exporting import export_config, recognise
from blockwright.plugins.hub.hf_export import export
from blockwright.plugins.hub.own import OWN
from blockwright.plugins.planner.handover.automodel import AUTOMODEL
from blockwright.plugins.planner.handover.megatron_bridge import MEGATRON_BRIDGE
from blockwright.plugins.planner.handover.training import Engine, Settings, settings, training
from blockwright.plugins.planner.hardware import coefficients
from blockwright.plugins.planner.layout import Job
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.request import Cluster
from blockwright.plugins.planner.search import ERROR, Candidate, search
from blockwright.registry import ConfigError
from blockwright.registry.command import sort_words
from blockwright.registry.reading import keys, read, typed

ENGINES = {"megatron-bridge": MEGATRON_BRIDGE, "automodel": AUTOMODEL}


def hand_over(given: argparse.Namespace) -> None:
    """Write the folder and the run configuration.

    Raises:
        ConfigError: the engine lacks the model, the schedule or the layout; nothing has been written
    """
    engine = ENGINES[given.to]
    words = sort_words(given.settings, keys(Cluster))
    cluster = read(Cluster, typed(Cluster, words.settings))
    has_weights = given.source.exists() and given.source.suffix not in (".yaml", ".yml")
    if not has_weights:
        for option, value in (("--dtype", given.dtype), ("--max-shard-size", given.max_shard_size)):
            if value is not None:
                rule = f"is of weights, and {given.source} is a composition without any"
                raise ConfigError(option, value, rule, "Leave it out, or name a run")
    decoder, origin = _opened(given.source, has_weights)
    family, _, why = recognise(decoder, given.family, origin)
    if family.model_type == OWN.model_type:
        remedy = f"Change the composition; {engine.title} has {', '.join(engine.families)}"
        raise ConfigError("--to", given.to, f"no family of transformers describes this model: {why}", remedy)
    sizes = engine.sizes(family.model_type, cluster.chosen)
    trained = settings(given.source, words.overrides)
    job = Job(cluster.gpus, trained.batch, trained.length)
    found = search(measure(decoder), job, cluster.device, coefficients(), sizes, top=100)
    best = in_whole_rounds(found.best, job)
    given_over = training(decoder, trained, job, best[0].layout, given.out, has_weights)
    beside = {engine.file: engine.text(given_over, family.model_type)}
    if has_weights:
        export(given, beside)
    else:
        export_config(decoder, given.out, family=family.model_type, beside=beside)
        print(f"Wrote config.json of model_type {family.model_type!r} to {given.out}; there are no weights.")
    _say(engine, given.out, best, trained, given.source)


def in_whole_rounds(found: Sequence[Candidate], job: Job) -> list[Candidate]:
    """The layouts that the engines' schedules take: of interleaved stages, as many micro-batches as fill all rounds.

    Raises:
        ConfigError: there is none
    """
    kept = [c for c in found if c.layout.interleave == 1 or c.layout.micro_batches(job) % c.layout.pipeline == 0]
    if not kept:
        rule = "leaves interleaved stages a number of micro-batches that is no multiple of the pipeline's stages"
        raise ConfigError("data.batch_size", job.batch, rule, "Change it, or write interleave=1")
    return kept


def _opened(run: Path, has_weights: bool) -> tuple[Decoder, dict[str, object]]:
    if not has_weights:
        return load(str(run)), {}
    source = open_source(run)
    return compose(source.model, device="meta"), source.origin


def _say(engine: Engine, out: Path, best: Sequence[Candidate], used: Settings, run: Path) -> None:
    print(f"Configuration for {engine.title}: {out / engine.file}, not yet run with that engine.")
    for word, found in zip(("Layout", "  next", "  next"), best, strict=False):
        print(f"{word}: {found.layout}, {found.speed:,.0f} tokens/s per GPU by the planner")
    print(f"Layouts within {ERROR:.0%}, the planner's error, are tied.")
    kind = "of the run" if (run / ".hydra").is_dir() else "the defaults of this project, and what was given"
    steps = f"{used.steps:,} steps of {used.batch:,} sequences of {used.length:,} tokens"
    print(f"Training ({kind}): {steps}, {used.optimizer!r}, {used.rates}.")
    print("Left to you: the data's path (???), balance losses, and which weights decay.")
