"""What a layout keeps in the memory of a GPU, in bytes by part.

Parameters, gradients and optimizer state are counted parameter by parameter (training/parallel/arithmetic.py), so for a
layout that this project runs they are what its dry run counts. Layers, embedding and head are spread evenly over the
stages of a pipeline. Left out: the allocator's fragments, buffers of collectives, CUDA's own.
"""

from __future__ import annotations

import functools

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.mla import MLA
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.kernels.attention import EXPANDED, KEPT
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import Measured, count_places
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.arithmetic import (
    COLLECTIVES,
    Crossing,
    Holding,
    crossings,
    holdings,
    state_factors,
    token_numbers,
    weight_numbers,
)
from blockwright.training.parallel.sizes import Sizes

USABLE = 0.9  # of a GPU's memory: the rest goes to CUDA, NCCL and fragments
LOGITS = 0.25  # of a micro-batch's logits, in fp32: the loss is computed in chunks
LAYERS_GATHERED = 2  # FSDP2 gathers one layer ahead
WORKING = 4  # times the keys and values of the heads that are expanded at a time: themselves, their gradients, copies


@functools.lru_cache(maxsize=256)
def spread(measured: Measured, tensor: int, expert: int) -> tuple[Holding, ...]:
    """How parameters are split by ``tensor`` ranks, and experts by ``expert`` × ``tensor``."""
    return tuple(holdings(measured.decoder, Sizes(1, expert, tensor, expert)))


@functools.lru_cache(maxsize=1 << 16)
def numbers(measured: Measured, sizes: Sizes, *, held: bool, routed: bool | None = None, tables: bool = True) -> int:
    """Parameters on a rank.

    Args:
        held: those it keeps when FSDP2 spreads them; else those it computes with
        routed: of experts, or of all else; None: both
        tables: whether those in the tables of memories count, which FSDP2 never gathers
    """
    total = 0
    for h in spread(measured, sizes.tensor, sizes.expert):
        if (routed is None or h.routed == routed) and (tables or not h.table):
            total += h.times * (h.held(sizes) if held else h.gathered)
    return total


@functools.lru_cache(maxsize=64)
def _factor(measured: Measured, recipe: OptimizerRecipe) -> float:
    """Numbers of optimizer state for each parameter, on average."""
    factors = state_factors(measured.decoder, recipe)
    whole = spread(measured, 1, 1)
    return sum(h.times * h.gathered * sum(factors[h.name]) for h in whole) / sum(h.times * h.gathered for h in whole)


ADAMW = AdamW()


def memory(measured: Measured, job: Job, layout: Layout, recipe: OptimizerRecipe = ADAMW) -> dict[str, float]:
    """Bytes on a GPU at their peak.

    Args:
        recipe: of the optimizer
    """
    sizes, stages = layout.sizes(job), layout.pipeline
    held = numbers(measured, sizes, held=True) / stages
    whole = numbers(measured, sizes, held=False) / stages
    state = _factor(measured, recipe)
    if layout.shard:  # fp32 throughout, as FSDP2 keeps them here; gathered in bf16, scattered in fp32
        parts = {"parameters": 4 * held, "gradients": 4 * held, "optimizer": 4 * state * held}
        computed = numbers(measured, sizes, held=False, tables=False)
        parts["gathered"] = (2 + 4) * LAYERS_GATHERED * computed / measured.n_layers
    else:  # bf16 weights and fp32 gradients on every rank; master weights and optimizer state spread
        parts = {"parameters": 2 * whole, "gradients": 4 * whole, "optimizer": 4 * (1 + state) * held, "gathered": 0.0}
    parts["gathered"] += _of_other_tokens(measured, job, layout)
    return {**parts, **_activations(measured, job, layout)}


def _of_other_tokens(measured: Measured, job: Job, layout: Layout) -> float:
    """What context parallelism gathers, of all tokens of a sequence, and the keys and values that MLA expands of it."""
    if layout.context == 1:
        return 0.0
    tokens, L = layout.micro_batch * job.length, measured.n_layers
    layers = 1 if layout.recompute == "full" else L / layout.pipeline  # of which it is kept for the backward pass
    found = layers * 2 * tokens * measured.cached / L / measured.cache_split(layout.tensor)
    expanded = max((_expanded(layer.attention) for layer in measured.decoder.layers), default=0)  # type: ignore[arg-type]
    a_layer = 2 * tokens * expanded / layout.tensor
    return found + (layers * a_layer if a_layer <= KEPT else WORKING * min(a_layer, EXPANDED))


def _expanded(attention: Attention) -> int:
    """Numbers of a token's keys and values that an attention expands of what it caches."""
    if not isinstance(attention, MLA):
        return 0
    return attention.n_heads * (attention.nope + attention.rope + attention.v_head_dim)


def _activations(measured: Measured, job: Job, layout: Layout) -> dict[str, float]:
    tokens, L = layout.tokens(job), measured.n_layers
    inside = {part: measured.parts[part].kept / layout.tensor for part in ("attention", "ffn")}
    around = measured.parts["around"].kept / (1 if layout.runs_here() else layout.tensor)
    everything = sum(inside.values()) + around
    inputs = 2 * measured.inputs / (1 if layout.runs_here() else layout.tensor)
    share = layout.recompute if isinstance(layout.recompute, float) else 0.0
    kept = {"none": everything, "selective": everything - inside["ffn"] + inputs, "full": inputs}.get(
        str(layout.recompute), everything * (1 - share)
    )
    flights: float = min(layout.micro_batches(job), layout.pipeline)
    if layout.interleave > 1:
        flights *= 1 + (layout.pipeline - 1) / (layout.pipeline * layout.interleave)
    again = (everything - kept) / L  # of the layer that is computed again
    logits = LOGITS * 4 * tokens * measured.decoder.config["vocab_size"] / layout.tensor
    return {"activations": tokens * (kept / layout.pipeline * flights + again), "logits": logits}


# --- what travels between GPUs in an optimizer step, in bytes by kind -------------------------------------------------


KINDS = (*COLLECTIVES, "context", "point_to_point")


def traffic(
    measured: Measured,
    job: Job,
    layout: Layout,
    weight_bytes: float = 2,
    gradient_bytes: float = 4,
    state_bytes: float = 2,
) -> dict[str, float]:
    """Bytes through a GPU in a step.

    Args:
        weight_bytes, gradient_bytes, state_bytes: of a weight that is gathered, of a gradient that is scattered, of a
            number of hidden states
    """
    sizes, times, stages = layout.sizes(job), layout.micro_batches(job), layout.pipeline
    tokens, width = layout.tokens(job), measured.decoder.config["d_model"]
    rows = tokens * reached(measured, layout.expert) / layout.tensor
    states = token_numbers(crossed(measured, sizes.tensor, sizes.expert), sizes, width, tokens, rows)
    found = {kind: times * state_bytes * value / stages for kind, value in states.items()}
    if layout.shard:
        weights = weight_numbers(spread(measured, sizes.tensor, sizes.expert), sizes)
        found["all_gather"] += times * weight_bytes * weights["all_gather"] / stages
        found["reduce_scatter"] += times * gradient_bytes * weights["reduce_scatter"] / stages
    elif sizes.sharing > 1:
        once = numbers(measured, sizes, held=False) / stages
        found["all_gather"] += weight_bytes * once
        found["reduce_scatter"] += gradient_bytes * once
    found["context"] = 0.0
    if layout.context > 1:  # what a layer remembers of the sequence is gathered, and its gradient scattered
        remembered = measured.cached * layout.micro_batch * job.length / layout.pipeline
        found["context"] = times * state_bytes * 2 * remembered / measured.cache_split(layout.tensor)
    crossing = 2 * tokens * width * layout.interleave if stages > 1 else 0.0
    found["point_to_point"] = times * state_bytes * crossing
    return found


@functools.lru_cache(maxsize=256)
def crossed(measured: Measured, tensor: int, expert: int) -> tuple[Crossing, ...]:
    """The blocks that these sizes split."""
    return tuple(crossings(measured.decoder, Sizes(1, expert, tensor, expert)))


@functools.lru_cache(maxsize=256)
def reached(measured: Measured, places: int) -> float:
    """Places that a token's experts lie at, with the experts over so many; the mean over the layers that route."""
    gates = [m for m in measured.decoder.layers.modules() if isinstance(m, Gating)]
    return count_places(gates[-1], places) if gates and places > 1 else float(bool(gates))
