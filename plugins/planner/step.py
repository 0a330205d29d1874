"""How long a training step takes, by part: an analytic model, whose coefficients published runs fix.

A micro-batch computes products, scores and elementwise operators, each at a fitted fraction of what the device can;
small products reach less of it. Collectives of a group inside an island run over NVLink; those of a larger one are
hierarchical, and use the NICs of all members of the group in an island. All-to-alls send a token once to each island
that one of its experts is in, and on from there. A pipeline adds its bubble (p − 1)/(v·m), halved by the schedules
that fill it; where it is known which layers are in which stage, the one with the most work decides. Left out: jitter,
stragglers, input, checkpoints, and restarts.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockwright.plugins.planner.hardware import Coefficients, Hardware
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import Measured
from blockwright.plugins.planner.memory import numbers, reached

KNEE = 8192  # tokens, beyond which attention's kernels are as fast as they get
RAMP = 1024  # tokens of a sequence at which they are half as fast as that
STATE = 2  # bytes of a number of hidden states
CAST = 4  # bytes moved to turn a number of a product's input, or of its output's gradient, into fp8 and its transpose
PIPED = 0.3  # of the time of stages' messages, that which nothing hides


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Args:
        parts: what it consists of → seconds; their sum is the step
        flops: of the model on one GPU, nothing counted twice that is computed again
        tokens: on one GPU
    """

    parts: dict[str, float]
    flops: float
    tokens: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds


def collective(hardware: Hardware, nbytes: float, ranks: int, stride: int) -> float:
    """Seconds of an all-gather or reduce-scatter of ``nbytes`` in all, over ranks that are ``stride`` apart."""
    if ranks <= 1:
        return 0.0
    near = max(1, min(ranks, hardware.island // stride))  # of the group, in one island
    if near >= ranks:
        return nbytes * (ranks - 1) / ranks / hardware.nvlink
    far = nbytes * (ranks - near) / ranks / (hardware.nic * near)
    return max(nbytes / hardware.nvlink, far) if near > 1 else far


def step(measured: Measured, job: Job, layout: Layout, hardware: Hardware, fitted: Coefficients) -> Step:
    """Seconds of a step."""
    times, stages = layout.micro_batches(job), layout.pipeline
    layers = _computed(measured, job, layout, hardware, fitted) | _exchanged(measured, job, layout, hardware, fitted)
    parts = {name: times * seconds / stages for name, seconds in layers.items()}
    parts["unequal stages"] = sum(parts.values()) * (_busiest(measured, job, layout) - 1)
    parts["stages' messages"] = times * _messages(measured, job, layout, hardware)
    weights = _gathered(measured, job, layout, hardware)
    busy = sum(parts.values())
    parts["weights gathered"] = max(fitted.gathered * times * weights, times * weights - busy)
    bubble = (stages - 1) / (layout.interleave * times) * (1.0 if layout.schedule == "1f1b" else 0.5)
    parts["pipeline bubble"] = sum(parts.values()) * bubble
    parts["gradients"] = fitted.gradients * _reduced(measured, job, layout, hardware)
    held = numbers(measured, layout.sizes(job), held=True) / stages
    parts["optimizer"] = 32 * held / hardware.hbm  # fp32 weight, gradient and two moments, read and written
    tokens = job.batch * job.length / job.gpus
    return Step(parts, measured.training_flops(job.length) * tokens, tokens)


def _computed(m: Measured, job: Job, layout: Layout, hardware: Hardware, fitted: Coefficients) -> dict[str, float]:
    """Of a micro-batch through all layers."""
    tokens, knee = layout.tokens(job), fitted.rows
    peak = hardware.bf16 * hardware.sustained * hardware.speed
    faster = fitted.fp8 if job.precision == "fp8" else 1.0

    def thin(rows: float, columns: float) -> float:
        return rows / (rows + knee) * columns / (columns + knee)

    a_rank = tokens / layout.tensor
    products = sum(p.flops / thin(tokens, p.narrow(layout.tensor)) for p in m.whole.products)
    forward = {
        "dense products": a_rank * products / (fitted.dense * peak * faster),
        "attention scores": a_rank * m.scores_at(job.length) / (fitted.scores * peak * _ramp(job.length)),
        "elementwise": a_rank * m.whole.kept * fitted.moved / (hardware.hbm * hardware.speed),
    }
    if m.n_routed:
        rows = tokens * m.visits * layout.expert / m.n_experts
        reached = fitted.routed * peak * faster**0.5 * thin(max(rows, 1), m.expert_width)
        forward["experts' products"] = a_rank * m.whole.routed / reached
    found = {name: 3 * seconds for name, seconds in forward.items()}
    if job.precision == "fp8":
        found["casts to fp8"] = a_rank * CAST * m.crossing_numbers / hardware.hbm / hardware.speed
    found["recomputation"] = _repeated(m, layout, job.length) * sum(forward.values())
    found["launches"] = fitted.launch_dense * (m.n_layers - m.n_routed) + fitted.launch_routed * m.n_routed
    return found


def _ramp(length: int) -> float:
    return min(length, KNEE) / (RAMP + min(length, KNEE))


def _repeated(measured: Measured, layout: Layout, length: int) -> float:
    """Fraction of the forward pass that is computed once more."""
    if isinstance(layout.recompute, str):
        return {"none": 0.0, "selective": measured.ffn_share(length), "full": 1.0}[layout.recompute]
    return layout.recompute


def _exchanged(m: Measured, job: Job, layout: Layout, hardware: Hardware, fitted: Coefficients) -> dict[str, float]:
    """Of hidden states of a micro-batch, between ranks of all layers."""
    tokens, width = layout.tokens(job), m.decoder.config["d_model"]
    again = _repeated(m, layout, job.length)
    once = collective(hardware, STATE * tokens * width, layout.tensor, 1)
    found = {"tensor parallelism": fitted.tensor * m.n_layers * (8 + 4 * again) * once}
    heads = m.cache_split(layout.tensor)
    memory = STATE * m.cached * layout.micro_batch * job.length / heads
    found["context parallelism"] = fitted.context * 3 * collective(hardware, memory, layout.context, layout.tensor)
    found["experts' exchange"] = 0.0
    if m.n_routed and layout.expert > 1:
        dispatch = 1 if job.precision == "fp8" else 2  # bytes of a number sent to an expert; 2 for its result
        nbytes = tokens / layout.tensor * width * m.n_routed * 2 * (dispatch + 2)
        islands = max(1.0, layout.expert / hardware.island)
        near = reached(m, layout.expert) * (1 - 1 / layout.expert) / (0.6 * hardware.nvlink)
        far = reached(m, round(islands)) * (1 - 1 / islands) / hardware.nic if islands > 1 else 0.0
        hidden = 0.25 if layout.schedule == "dualpipe" else 1.0
        found["experts' exchange"] = fitted.exchange * hidden * nbytes * (near + far)
    return found


def _busiest(m: Measured, job: Job, layout: Layout) -> float:
    """Work of the stages of the GPU that has most, over the mean; every layer counts alike."""
    layers = layout.layers_of_stages
    if not layers:
        return 1.0
    layer = (m.training_flops(job.length) / 3 - m.head) / m.n_layers
    work = [layer * sum(layers[first :: layout.pipeline]) for first in range(layout.pipeline)]
    work[-1] += m.head
    return max(work) * len(work) / sum(work)


def _messages(m: Measured, job: Job, layout: Layout, hardware: Hardware) -> float:
    if layout.pipeline == 1:
        return 0.0
    a_rank = layout.tokens(job) * m.decoder.config["d_model"] / layout.tensor
    return PIPED * 4 * layout.interleave * STATE * a_rank / hardware.nic / layout.pipeline


def _spread(m: Measured, job: Job, layout: Layout, hardware: Hardware, dense: float, routed: float) -> float:
    """Seconds of collectives over all weights of a rank, of so many bytes a number."""
    sizes = layout.sizes(job)
    apart = [numbers(m, sizes, held=False, routed=routed) / layout.pipeline for routed in (False, True)]
    over = sizes.sharing // sizes.expert
    found = collective(hardware, dense * apart[0], sizes.sharing, layout.tensor)
    return found + collective(hardware, routed * apart[1], over, sizes.expert * layout.tensor)


def _gathered(m: Measured, job: Job, layout: Layout, hardware: Hardware) -> float:
    """FSDP's collectives of a micro-batch: weights twice in bf16, gradients once."""
    return _spread(m, job, layout, hardware, 6, 6) if layout.shard else 0.0


def _reduced(m: Measured, job: Job, layout: Layout, hardware: Hardware) -> float:
    """Once a step without FSDP: gradients scattered, weights gathered."""
    return 0.0 if layout.shard else _spread(m, job, layout, hardware, 4, 4)
