"""What ``blockwright plan`` answers: layouts, generation, or the published runs.

Nothing is allocated: the composition is measured on the meta device, and an analytic model whose coefficients are
fitted on published runs says how long a step takes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.on_gpu import CARDS, attention_kernels, every
from blockwright.lab.describe import usual_context
from blockwright.lab.models import chosen, load
from blockwright.plugins.planner import table
from blockwright.plugins.planner.generation import Generation, generation
from blockwright.plugins.planner.hardware import beyond, coefficients
from blockwright.plugins.planner.layout import Job
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.request import Request, read_request
from blockwright.plugins.planner.search import Candidate, Found, search
from blockwright.plugins.planner.table import as_plain
from blockwright.registry import ConfigError
from blockwright.registry.command import strict_json
from blockwright.registry.printing import show
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.preflight import preflight

NODE = 8  # GPUs of one machine, at most


def answer(arguments: Sequence[str]) -> None:
    """Print it.

    Raises:
        ConfigError: whatever is wrong with the arguments or with the model, or no layout fits
    """
    if "--published" in arguments:
        from blockwright.plugins.planner.fitting import judgement, summary

        if extra := [word for word in arguments if word != "--published"]:
            raise ConfigError("command line", extra[0], "--published takes nothing beside it", "Leave it out")
        rows = judgement()
        show(table.judged([(j.run.name, j.used, j.run.tokens, j.predicted) for j in rows], summary(rows)))
        return
    request = read_request(arguments)
    decoder = load(request.settings.model, request.overrides)
    length = request.settings.length or usual_context([decoder])
    if length > decoder.config["max_positions"]:
        rule = f"is longer than the model is made for (model.max_positions = {decoder.config['max_positions']})"
        raise ConfigError("length", length, rule, "Shorten it, or raise model.max_positions")
    (_generation if request.show == "generation" else _layouts)(request, decoder, length)


def _layouts(request: Request, decoder: Decoder, length: int) -> None:
    measured, fitted = measure(decoder), coefficients()
    settings, device = request.settings, request.settings.device
    job = Job(settings.gpus, request.batch, length, settings.precision)
    found = search(measured, job, device, fitted, settings.chosen)
    attention = attention_kernels(decoder, {device.card: CARDS[device.card]})[device.card]
    if request.as_json:
        rows = [as_plain(c, found.best[0], measured, job, device, settings) for c in found.best]
        plain = {"model": settings.model, "job": asdict(job), "gpu": asdict(device), "layouts": rows}
        seen = {"considered": found.considered, "fit": found.fit, "warnings": beyond(job), "attention": attention}
        print(strict_json({**plain, **seen}))
        return
    show(table.layouts(found, measured, job, device, settings))
    if every(attention):
        by = "; ".join(f"{kind} {', '.join(attention[kind])}" for kind in ("training", "documents"))
        print(f"Attention on {device.card}, a forecast: {by}")
    for line in beyond(job):
        print(f"warning: {line}", file=sys.stderr)
    if request.explain:
        show(table.explained(found.best[0]))
    _say_how(request, found, job)


def _say_how(request: Request, found: Found, job: Job) -> None:
    """The command of the fastest layout that this project trains."""
    if found.here is None:
        print("None of these fit with what this project trains itself: pipeline=1 shard=true precision=bf16")
        return
    slower = found.best[0].speed / found.here.speed - 1
    speed = f"{found.here.speed:,.0f} tokens/s per GPU, {slower:.1%} slower than the best"
    print(f"Fastest here ({found.here.layout}, {speed}):")
    print(f"  {command(request, found.here, job)}")
    if (error := refusal(request, found.here, job)) is not None:
        print(f"  a run refuses this: {error.path} {error.rule}. {error.remedy}")


def refusal(request: Request, candidate: Candidate, job: Job) -> ConfigError | None:
    """Why a run refuses the command of a layout, if it does; the GPUs themselves are not looked for."""
    _, _, *words = shlex.split(command(request, candidate, job))
    try:
        preflight(compose_config([*words, "trainer.accelerator=cpu"], output_dir="."))
    except ConfigError as error:
        return error
    return None


def command(request: Request, candidate: Candidate, job: Job) -> str:
    """The training that a layout stands for, on nodes of at most eight GPUs that are alike."""
    layout, sizes = candidate.layout, candidate.layout.sizes(job)
    spread = {"tensor": sizes.tensor, "expert": sizes.expert, "context": sizes.context}
    words = [*chosen(request.settings.model, request.overrides), "trainer=fsdp", "trainer.precision=bf16-mixed"]
    words += [f"trainer.strategy.{name}={size}" for name, size in spread.items() if size > 1]
    devices = max(size for size in range(1, NODE + 1) if job.gpus % size == 0)
    words += [f"trainer.devices={devices}", f"trainer.num_nodes={job.gpus // devices}"]
    rows = layout.micro_batch * layout.data(job)
    words += [f"data.batch_size={rows}", f"data.eval_batch_size={rows}", f"data.sequence_length={job.length}"]
    words += [f"trainer.accumulate_grad_batches={layout.micro_batches(job)}"]
    words += [f"task.activation_checkpointing={layout.recompute}"] * (layout.recompute != "none")
    return shlex.join(["blockwright", "train", *words])


def _generation(request: Request, decoder: Decoder, length: int) -> None:
    settings, device = request.settings, request.settings.device
    bits = {"weight_bits": settings.weight_bits, "cache_bits": settings.cache_bits}
    at: dict[str, Any] = {"gpus": settings.gpus, "context": length, **bits}
    found: Generation = generation(decoder, device, coefficients(), **at)
    if request.as_json:
        print(strict_json({**asdict(found), "tokens_per_second": found.tokens_per_second, **bits}))
    else:
        node = f"{settings.gpus} {device.name}, {length:,} tokens in each cache"
        show(table.generated(found, "{}, {weight_bits:g}-bit weights, {cache_bits:g}-bit caches".format(node, **bits)))
