"""Every layout of a job that divides and fits, and the best of them that differ."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockwright.plugins.planner.hardware import Coefficients, Hardware
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import Measured
from blockwright.plugins.planner.memory import USABLE, memory
from blockwright.plugins.planner.step import Step, step
from blockwright.registry import ConfigError
from blockwright.training.parallel.refusals import blocks_of, check_attentions, check_block, check_sizes
from blockwright.training.parallel.sizes import Sizes

ERROR = 0.12  # of the model on runs it was not fitted on (plugins/planner/fitting.py): nearer than that is a tie
SHORTEST = 512  # tokens of a sequence on a GPU

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4, 8),
    "pipeline": (1, 2, 4, 8, 16),
    "context": (1, 2, 4, 8, 16, 32, 64),
    "expert": (1, 2, 4, 8, 16, 32, 64, 128),
    "interleave": (1, 2, 4),
    "micro_batch": (1, 2, 4),
    "shard": (False, True),
    "recompute": ("none", "selective", "full"),
}


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Args:
        memory: part → bytes
    """

    layout: Layout
    step: Step
    memory: dict[str, float]

    @property
    def speed(self) -> float:
        return self.step.tokens_per_second


@dataclass(frozen=True)
class Found:
    """What a search has seen.

    Args:
        best: the fastest layouts, no two of which have the same sizes, the fastest first
        here: the fastest that this project runs itself; None if none fits
        considered: layouts that divide
        fit: how many of them fit the memory
        refused: reason → layouts that it rules out
    """

    best: list[Candidate]
    here: Candidate | None
    considered: int
    fit: int
    refused: dict[str, int]


def search(
    measured: Measured,
    job: Job,
    hardware: Hardware,
    fitted: Coefficients,
    chosen: Mapping[str, Sequence[Any]] | None = None,
    top: int = 5,
) -> Found:
    """Try all layouts.

    Args:
        chosen: values of some of ``CHOICES`` in place of the usual ones
        top: how many to keep

    Raises:
        ConfigError: none divides, or none fits
    """
    refused: Counter[str] = Counter()
    room, fit, considered = USABLE * hardware.memory, [], 0
    least: tuple[float, Layout] | None = None
    for layout in layouts(measured, job, {**CHOICES, **(chosen or {})}, refused):
        considered += 1
        parts = memory(measured, job, layout)
        total = sum(parts.values())
        if total <= room:
            fit.append(Candidate(layout, step(measured, job, layout, hardware, fitted), parts))
        elif least is None or total < least[0]:
            least = total, layout
    if not fit:
        raise _nothing(job, hardware, least, refused)
    fit.sort(key=lambda candidate: -candidate.speed)
    best: dict[tuple[Any, ...], Candidate] = {}
    for candidate in fit:
        best.setdefault(_sizes(candidate.layout), candidate)
    here = next((candidate for candidate in fit if candidate.layout.trains_here(job)), None)
    return Found(list(best.values())[:top], here, considered, len(fit), dict(refused))


def _sizes(layout: Layout) -> tuple[Any, ...]:
    return layout.tensor, layout.pipeline, layout.context, layout.expert, layout.shard


def _nothing(job: Job, hardware: Hardware, least: tuple[float, Layout] | None, refused: Counter[str]) -> ConfigError:
    if least is None:
        of_the_model_first = sorted(refused, key=lambda reason: (not reason.startswith("model."), -refused[reason]))
        reasons = "; ".join(of_the_model_first[:3])
        return ConfigError("gpus", job.gpus, f"no layout divides: {reasons}", "Change gpus, batch or the chosen sizes")
    room = USABLE * hardware.memory / 1e9
    rule = f"the smallest layout ({least[1]}) takes {least[0] / 1e9:,.0f} GB a GPU, which has {room:,.0f}"
    return ConfigError("gpus", job.gpus, rule, "Use more GPUs, larger ones, or a shorter sequence")


def layouts(
    measured: Measured, job: Job, choices: Mapping[str, Sequence[Any]], refused: Counter[str]
) -> Iterator[Layout]:
    """The layouts whose sizes divide the GPUs, the batch, the sequence and the model.

    Args:
        choices: values of each of ``CHOICES``
        refused: counts those that do not, by reason
    """
    names = tuple(choices)
    splits = _Splits(measured)
    for values in itertools.product(*choices.values()):
        layout = Layout(**dict(zip(names, values, strict=True)))
        reason = _indivisible(measured, job, layout) or splits.refusal(layout)
        if reason:
            refused[reason] += 1
        else:
            yield layout


def _indivisible(measured: Measured, job: Job, layout: Layout) -> str:
    """Why a layout cannot be, or nothing."""
    stages, routed = layout.pipeline, measured.n_routed > 0
    if job.gpus % (layout.tensor * stages * layout.context):
        return "tensor × pipeline × context does not divide gpus"
    data = layout.data(job)
    if job.batch % (data * layout.micro_batch):
        return "data-parallel GPUs × micro_batch do not divide batch"
    if layout.context > 1 and layout.micro_batch > 1:
        return "context splits sequences, of which a micro-batch then needs one"
    if layout.context > 1 and job.length // layout.context < SHORTEST:
        return f"context leaves a GPU fewer than {SHORTEST} tokens of a sequence"
    if layout.context > 1 and job.length % (2 * layout.context):
        return "2 × context does not divide length"
    if layout.expert % layout.tensor if routed else layout.expert > 1:
        return (
            "expert is no multiple of tensor" if routed else "expert distributes experts, of which the model has none"
        )
    if routed and (data * layout.context * layout.tensor) % layout.expert:
        return "expert does not divide the GPUs of a stage"
    if stages > 1 and measured.decoder.loop is not None:
        return "pipeline gives a layer to one stage, and a loop visits it again"
    if stages == 1 and layout.interleave > 1:
        return "interleave needs a pipeline"
    if stages * layout.interleave > measured.n_layers or (stages > 1 and layout.micro_batches(job) < stages):
        return "pipeline has more stages than layers or micro-batches"
    if stages > 1 and layout.shard and layout.micro_batches(job) > 2 * stages:
        return "weights would be gathered for each of many micro-batches of a pipeline"
    return ""


class _Splits:
    """Whether heads, widths and experts divide, as a run here would be refused (training/parallel/refusals.py)."""

    def __init__(self, measured: Measured) -> None:
        self.decoder, self.blocks = measured.decoder, blocks_of(measured.decoder.config)
        self.unsplit: str | None = None  # why its sequences cannot be split, or nothing; None until asked
        self.known: dict[tuple[int, int, int], str] = {}

    def refusal(self, layout: Layout) -> str:
        key = layout.tensor, layout.expert, layout.context
        if key not in self.known:
            self.known[key] = self._refusal(*key)
        return self.known[key]

    def _refusal(self, tensor: int, expert: int, context: int) -> str:
        if context > 1 and (reason := self._of_context()):
            return reason
        try:
            check_sizes(self.blocks, Sizes(1, expert, tensor, max(1, expert // tensor)))
        except ConfigError as error:
            return f"{error.path} = {error.value} does not divide"
        return ""

    def _of_context(self) -> str:
        if self.unsplit is None:
            self.unsplit = ""
            try:
                for block in self.blocks:
                    check_block(*block[:3])
                check_attentions(self.decoder)
            except ConfigError as error:
                self.unsplit = f"{error.path} = {error.value} needs all tokens of a sequence, which context splits"
        return self.unsplit
