"""Accelerators by name, gpus/*.yaml, and how much of them training reaches, coefficients.yaml."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blockwright import registry
from blockwright.plugins.planner.layout import Job
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.limits import read_text

FOLDER, COEFFICIENTS, PUBLISHED = map(Path(__file__).with_name, ("gpus", "coefficients.yaml", "published.yaml"))


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and its links, in bytes, seconds, FLOPs and watts.

    Args:
        bf16, fp8: FLOP/s of dense matrix products at peak
        memory: bytes
        hbm, nvlink, nic: bytes/s that are reached: of memory, and a direction of each link, for one GPU
        island: GPUs that NVLink joins; the NICs of an island carry its traffic together
        watts: that a GPU draws at its limit
        card: of ``blockwright.blocks.on_gpu.CARDS``, which kernels depend on
        sustained: fraction of the peak that a power limit leaves
        speed: what kernels reach against the H100 that the coefficients are fitted on
    """

    name: str
    bf16: float
    fp8: float
    memory: float
    hbm: float
    nvlink: float
    nic: float
    island: int
    watts: float
    card: str
    sustained: float = 1.0
    speed: float = 1.0


@dataclass(frozen=True)
class Coefficients:
    """How much of a device training reaches, fitted on published runs (plugins/planner/fitting.py).

    Args:
        dense, routed, scores: fractions of the peak that large matrix products, the experts' and attention's reach
        rows: a product of M rows and N columns on a rank reaches M/(M + rows) · N/(N + rows) of that
        fp8: how much faster products are in fp8; the experts' are by its root
        moved: bytes that fused kernels move for each byte that autograd keeps
        launch_dense, launch_routed: seconds a layer and micro-batch that no kernel runs
        tensor, context, exchange, gradients: fractions of those collectives' time that nothing hides
        gathered: fraction of FSDP's collectives that nothing hides, if computing takes longer than they do
    """

    dense: float
    routed: float
    scores: float
    rows: float
    fp8: float
    moved: float
    launch_dense: float
    launch_routed: float
    tensor: float
    context: float
    exchange: float
    gradients: float
    gathered: float


@functools.cache
def names() -> list[str]:
    """Every device there is a file of."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@functools.cache
def hardware(name: str) -> Hardware:
    """The device of a name.

    Raises:
        ConfigError: there is none
    """
    if name not in names():
        raise ConfigError("gpu", name, "there is no such device in plugins/planner/gpus", did_you_mean(name, names()))
    return Hardware(name=name, **{"speed": _fitted()["speed"].get(name, 1.0), **_read(FOLDER / f"{name}.yaml")})


def beyond(job: Job) -> list[str]:
    """In what a job lies beyond every published run: there the planner has never been compared with anything."""
    runs = _read(PUBLISHED)["runs"]
    most = {name: max(run[name] for run in runs) for name in ("gpus", "length")}
    asked = {"gpus": job.gpus, "length": job.length}
    return [
        f"{name} = {asked[name]:,} is beyond every published run (at most {largest:,}): this is extrapolated"
        for name, largest in most.items()
        if asked[name] > largest
    ]


def coefficients() -> Coefficients:
    """The fitted ones."""
    return Coefficients(**{f.name: _fitted()["coefficients"][f.name] for f in fields(Coefficients)})


@functools.cache
def _fitted() -> dict[str, Any]:
    return _read(COEFFICIENTS)


def _read(file: Path) -> dict[str, Any]:
    return registry.to_plain(read_text(file, str(file.name)))
