"""What travels between GPUs in an optimizer step, in bytes by kind.

Bytes of a collective are those of its full buffer on one GPU, as training/parallel/arithmetic.py has them, from which
the numbers come: for a layout that this project runs they are what its dry run counts.
"""

from __future__ import annotations

import functools

from blockwright.blocks.gating.base import Gating
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import Measured
from blockwright.plugins.planner.memory import numbers, spread
from blockwright.plugins.planner.routing import count_places
from blockwright.training.parallel.arithmetic import COLLECTIVES, Crossing, crossings, token_numbers, weight_numbers
from blockwright.training.parallel.sizes import Sizes

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
